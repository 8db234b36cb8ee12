"""The data of billing events. The payer is the user's organization."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clerkhooks import payloads
    from clerkhooks.clerk.fake_events import Scene

MONTH = 30 * 24 * 60 * 60 * 1000  # milliseconds
PRICE = 2900  # cents
_STATUSES = {"freeTrialEnding": "active", "pastDue": "past_due"}


def subscription(scene: Scene) -> payloads.SubscriptionEventPayload:
    """Return a subscription with one item."""
    status, payer = _status(scene), _payer(scene)
    return {
        "active_at": scene.at,
        "canceled_at": None,
        "created_at": scene.at,
        "ended_at": None,
        "id": scene.id("csub"),
        "items": [subscription_item(scene)],
        "latest_payment_id": scene.id("cpayment"),
        "object": "commerce_subscription",
        "past_due_at": scene.at if status == "past_due" else None,
        "payer": payer,
        "payer_id": payer["id"],
        "payment_source_id": scene.id("cpmtsrc"),
        "status": status,
        "updated_at": scene.at,
    }


def subscription_item(scene: Scene) -> payloads.BillingSubscriptionItemEventPayload:
    """Return an item of the subscription, with its plan."""
    plan: payloads.BillingSubscriptionItemEventPlan = {**_plan(scene), "unit_prices": []}
    return {
        "created_at": scene.at,
        "id": scene.id("csub_item"),
        "interval": "month",
        "is_free_trial": scene.action == "freeTrialEnding",
        "object": "commerce_subscription_item",
        "payer": _payer(scene),
        "period_end": scene.at + MONTH,
        "period_start": scene.at,
        "plan": plan,
        "plan_id": plan["id"],
        "seats": {"quantity": None},
        "status": _status(scene),
        "subscription_id": scene.id("csub"),
        "updated_at": scene.at,
    }


def payment_attempt(scene: Scene) -> payloads.PaymentAttemptEventPayload:
    """Return a payment for the subscription: pending when it is created, and paid later."""
    is_paid, price = scene.action == "updated", _amount(PRICE)
    return {
        "billing_date": scene.at,
        "charge_type": "recurring",
        "created_at": scene.at,
        "failed_at": None,
        "failed_reason": None,
        "gateway_external_id": "pi_fake",
        "id": scene.id("cpayatt"),
        "instance_id": "ins_fake",
        "invoice_id": scene.id("cinv"),
        "paid_at": scene.at if is_paid else None,
        "payee": {
            "gateway_external_id": "acct_fake",
            "gateway_status": "active",
            "gateway_type": "stripe",
            "id": scene.id("cpayee"),
        },
        "payer": _payer(scene),
        "payment_id": scene.id("cpayment"),
        "payment_source": _payment_source(scene),
        "statement_id": scene.id("cstmt"),
        "status": "paid" if is_paid else "pending",
        "subscription_items": [_paid_item(scene)],
        "totals": {
            "grand_total": price,
            "per_unit_totals": [],
            "subtotal": price,
            "tax_total": _amount(0),
        },
        "updated_at": scene.at,
    }


def _paid_item(scene: Scene) -> payloads.BillingSubscriptionItem:
    plan = _plan(scene)
    return {
        "created_at": scene.at,
        "credits": None,
        "id": scene.id("csub_item"),
        "interval": "month",
        "object": "commerce_subscription_item",
        "payer": _payer(scene),
        "period_end": scene.at + MONTH,
        "period_start": scene.at,
        "plan": plan,
        "plan_id": plan["id"],
        "status": "active",
        "subscription_id": scene.id("csub"),
        "updated_at": scene.at,
    }


def _plan(scene: Scene) -> payloads.BillingPlan:
    return {
        "amount": PRICE,
        "currency": "USD",
        "id": scene.id("cplan"),
        "is_recurring": True,
        "name": "Pro",
        "slug": "pro",
    }


def _payer(scene: Scene) -> payloads.BillingPayerEventPayload:
    user, organization = scene.user, scene.organization
    return {
        "created_at": scene.at,
        "email": scene.email,
        "first_name": user["first_name"] or "",
        "id": scene.id("cpayer"),
        "image_url": organization.get("image_url", ""),
        "last_name": user["last_name"] or "",
        "object": "commerce_payer",
        "organization_id": organization["id"],
        "organization_name": organization["name"],
        "updated_at": scene.at,
        "user_id": user["id"],
    }


def _payment_source(scene: Scene) -> payloads.BillingPaymentSource:
    return {
        "card_type": "visa",
        "gateway": "stripe",
        "gateway_external_account_id": None,
        "gateway_external_id": "pm_fake",
        "id": scene.id("cpmtsrc"),
        "last4": "4242",
        "payment_method": "card",
        "status": "active",
    }


def _amount(cents: int) -> payloads.BillingAmount:
    return {
        "amount": cents,
        "amount_formatted": f"{cents / 100:.2f}",
        "currency": "USD",
        "currency_symbol": "$",
    }


def _status(scene: Scene) -> str:
    """Return the status that the event announces; a subscription is created active."""
    if scene.action in ("created", "updated"):
        return "active"
    return _STATUSES.get(scene.action, scene.action)
