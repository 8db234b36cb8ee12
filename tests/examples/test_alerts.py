"""Every metric in the alert rules and the dashboard exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from clerkhooks.clerk.fake import clerk_id
from tests.backend import Backend
from tests.conftest import MakeService
from tests.following import complete_round
from tests.support import user_event

TOKEN = "a-token-of-sixteen-characters-or-more"


def test_every_metric_exists(make_service: MakeService, backend: Backend) -> None:
    """The metrics of the rules and the dashboard are exported, some only after a webhook."""
    service = make_service(METRICS_TOKEN=TOKEN, **backend.environ)
    complete_round(service)
    service.outcome(user_event(clerk_id("user")))
    response = service.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    exported = set(re.findall(r"^# TYPE (\w+) ", response.text, re.MULTILINE))
    in_rules = set(re.findall(r"clerkhooks_\w+", read_rules()))
    in_dashboard = set(re.findall(r"clerkhooks_\w+", read_dashboard()))
    assert in_rules
    assert in_dashboard
    for name in in_rules | in_dashboard:
        assert name.removesuffix("_bucket") in exported


def test_shows_every_metric() -> None:
    """The dashboard shows each metric that the rules use, in panels that do not overlap."""
    assert set(re.findall(r"clerkhooks_\w+", read_rules())) <= set(
        re.findall(r"clerkhooks_\w+", read_dashboard())
    )
    places = [panel["gridPos"] for panel in load_panels()]
    cells = [
        (column, row)
        for place in places
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24


def read_rules() -> str:
    """Return the expressions of all alert rules."""
    content = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())
    rules = [rule for group in content["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return "\n".join(rule["expr"] for rule in rules)


def load_panels() -> list[Any]:
    """Return the panels of the Grafana dashboard."""
    panels: list[Any] = json.loads(Path(__file__).with_name("dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    return panels


def read_dashboard() -> str:
    """Return the expressions of all panels."""
    return "\n".join(target["expr"] for panel in load_panels() for target in panel["targets"])
