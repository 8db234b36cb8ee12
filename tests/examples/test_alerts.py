"""Every metric in the alert rules and every counter in the README exists."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.settings import PROJECT
from tests.conftest import MakeService
from tests.support import user_event

TOKEN = "a-token-of-sixteen-characters-or-more"


def test_every_metric_exists(make_service: MakeService) -> None:
    """After a webhook, the metrics in the rules and the counters in the README are exported."""
    service = make_service(METRICS_TOKEN=TOKEN)
    service.outcome(user_event(clerk_id("user")))
    response = service.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    exported = set(re.findall(r"^# TYPE (\w+) ", response.text, re.MULTILINE))
    in_rules = set(re.findall(r"clerkhooks_\w+", read_rules()))
    counters = set(re.findall(r"clerkhooks_\w+_total", (PROJECT / "README.md").read_text()))
    assert in_rules
    assert counters
    for name in in_rules | counters:
        assert name.removesuffix("_bucket") in exported


def read_rules() -> str:
    """Return the expressions of all alert rules."""
    content = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())
    rules = [rule for group in content["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return "\n".join(rule["expr"] for rule in rules)
