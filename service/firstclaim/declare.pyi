"""Generated from stripe-python 16.1.0 by `python -m tests.typed_events`: do not edit."""

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol, TypeVar, overload

import stripe

from firstclaim.event import Event
from firstclaim.registry import Context

__all__ = ["on"]

_O = TypeVar("_O")
_R = TypeVar("_R", bound=str | Awaitable[str | None] | None)

class _Declare(Protocol[_O]):
    def __call__(self, function: Callable[[Event[_O], Context], _R], /) -> Callable[[Event[_O], Context], _R]: ...

@overload
def on(*patterns: Literal["account.updated"]) -> _Declare[stripe.Account]: ...
@overload
def on(
    *patterns: Literal[
        "customer.source.*",
        "customer.source.created",
        "customer.source.deleted",
        "customer.source.expiring",
        "customer.source.updated",
    ],
) -> _Declare[stripe.Account | stripe.BankAccount | stripe.Card | stripe.Source]: ...
@overload
def on(
    *patterns: Literal[
        "account.application.*",
        "account.application.authorized",
        "account.application.deauthorized",
    ],
) -> _Declare[stripe.Application]: ...
@overload
def on(
    *patterns: Literal[
        "application_fee.created",
        "application_fee.refunded",
    ],
) -> _Declare[stripe.ApplicationFee]: ...
@overload
def on(
    *patterns: Literal[
        "application_fee.refund.*",
        "application_fee.refund.updated",
    ],
) -> _Declare[stripe.ApplicationFeeRefund]: ...
@overload
def on(
    *patterns: Literal[
        "balance.*",
        "balance.available",
    ],
) -> _Declare[stripe.Balance]: ...
@overload
def on(
    *patterns: Literal[
        "balance_settings.*",
        "balance_settings.updated",
    ],
) -> _Declare[stripe.BalanceSettings]: ...
@overload
def on(
    *patterns: Literal[
        "account.external_account.*",
        "account.external_account.created",
        "account.external_account.deleted",
        "account.external_account.updated",
    ],
) -> _Declare[stripe.BankAccount | stripe.Card]: ...
@overload
def on(
    *patterns: Literal[
        "capability.*",
        "capability.updated",
    ],
) -> _Declare[stripe.Capability]: ...
@overload
def on(
    *patterns: Literal[
        "cash_balance.*",
        "cash_balance.funds_available",
    ],
) -> _Declare[stripe.CashBalance]: ...
@overload
def on(
    *patterns: Literal[
        "charge.captured",
        "charge.expired",
        "charge.failed",
        "charge.pending",
        "charge.refunded",
        "charge.succeeded",
        "charge.updated",
    ],
) -> _Declare[stripe.Charge]: ...
@overload
def on(
    *patterns: Literal[
        "coupon.*",
        "coupon.created",
        "coupon.deleted",
        "coupon.updated",
    ],
) -> _Declare[stripe.Coupon]: ...
@overload
def on(
    *patterns: Literal[
        "credit_note.*",
        "credit_note.created",
        "credit_note.updated",
        "credit_note.voided",
    ],
) -> _Declare[stripe.CreditNote]: ...
@overload
def on(
    *patterns: Literal[
        "customer.created",
        "customer.deleted",
        "customer.updated",
    ],
) -> _Declare[stripe.Customer]: ...
@overload
def on(
    *patterns: Literal[
        "customer_cash_balance_transaction.*",
        "customer_cash_balance_transaction.created",
    ],
) -> _Declare[stripe.CustomerCashBalanceTransaction]: ...
@overload
def on(
    *patterns: Literal[
        "customer.discount.*",
        "customer.discount.created",
        "customer.discount.deleted",
        "customer.discount.updated",
    ],
) -> _Declare[stripe.Discount]: ...
@overload
def on(
    *patterns: Literal[
        "charge.dispute.*",
        "charge.dispute.closed",
        "charge.dispute.created",
        "charge.dispute.funds_reinstated",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.updated",
    ],
) -> _Declare[stripe.Dispute]: ...
@overload
def on(
    *patterns: Literal[
        "file.*",
        "file.created",
    ],
) -> _Declare[stripe.File]: ...
@overload
def on(
    *patterns: Literal[
        "invoice.*",
        "invoice.created",
        "invoice.deleted",
        "invoice.finalization_failed",
        "invoice.finalized",
        "invoice.marked_uncollectible",
        "invoice.overdue",
        "invoice.overpaid",
        "invoice.paid",
        "invoice.payment_action_required",
        "invoice.payment_attempt_required",
        "invoice.payment_failed",
        "invoice.payment_succeeded",
        "invoice.sent",
        "invoice.upcoming",
        "invoice.updated",
        "invoice.voided",
        "invoice.will_be_due",
    ],
) -> _Declare[stripe.Invoice]: ...
@overload
def on(
    *patterns: Literal[
        "invoiceitem.*",
        "invoiceitem.created",
        "invoiceitem.deleted",
    ],
) -> _Declare[stripe.InvoiceItem]: ...
@overload
def on(
    *patterns: Literal[
        "invoice_payment.*",
        "invoice_payment.paid",
    ],
) -> _Declare[stripe.InvoicePayment]: ...
@overload
def on(
    *patterns: Literal[
        "mandate.*",
        "mandate.updated",
    ],
) -> _Declare[stripe.Mandate]: ...
@overload
def on(
    *patterns: Literal[
        "payment_intent.*",
        "payment_intent.amount_capturable_updated",
        "payment_intent.canceled",
        "payment_intent.created",
        "payment_intent.partially_funded",
        "payment_intent.payment_failed",
        "payment_intent.processing",
        "payment_intent.requires_action",
        "payment_intent.succeeded",
    ],
) -> _Declare[stripe.PaymentIntent]: ...
@overload
def on(
    *patterns: Literal[
        "payment_link.*",
        "payment_link.created",
        "payment_link.updated",
    ],
) -> _Declare[stripe.PaymentLink]: ...
@overload
def on(
    *patterns: Literal[
        "payment_method.*",
        "payment_method.attached",
        "payment_method.automatically_updated",
        "payment_method.detached",
        "payment_method.updated",
    ],
) -> _Declare[stripe.PaymentMethod]: ...
@overload
def on(
    *patterns: Literal[
        "payout.*",
        "payout.canceled",
        "payout.created",
        "payout.failed",
        "payout.paid",
        "payout.reconciliation_completed",
        "payout.updated",
    ],
) -> _Declare[stripe.Payout]: ...
@overload
def on(
    *patterns: Literal[
        "person.*",
        "person.created",
        "person.deleted",
        "person.updated",
    ],
) -> _Declare[stripe.Person]: ...
@overload
def on(
    *patterns: Literal[
        "plan.*",
        "plan.created",
        "plan.deleted",
        "plan.updated",
    ],
) -> _Declare[stripe.Plan]: ...
@overload
def on(
    *patterns: Literal[
        "price.*",
        "price.created",
        "price.deleted",
        "price.updated",
    ],
) -> _Declare[stripe.Price]: ...
@overload
def on(
    *patterns: Literal[
        "product.*",
        "product.created",
        "product.deleted",
        "product.updated",
    ],
) -> _Declare[stripe.Product]: ...
@overload
def on(
    *patterns: Literal[
        "promotion_code.*",
        "promotion_code.created",
        "promotion_code.updated",
    ],
) -> _Declare[stripe.PromotionCode]: ...
@overload
def on(
    *patterns: Literal[
        "quote.*",
        "quote.accepted",
        "quote.canceled",
        "quote.created",
        "quote.finalized",
    ],
) -> _Declare[stripe.Quote]: ...
@overload
def on(
    *patterns: Literal[
        "charge.refund.*",
        "charge.refund.updated",
        "refund.*",
        "refund.created",
        "refund.failed",
        "refund.updated",
    ],
) -> _Declare[stripe.Refund]: ...
@overload
def on(
    *patterns: Literal[
        "review.*",
        "review.closed",
        "review.opened",
    ],
) -> _Declare[stripe.Review]: ...
@overload
def on(
    *patterns: Literal[
        "setup_intent.*",
        "setup_intent.canceled",
        "setup_intent.created",
        "setup_intent.requires_action",
        "setup_intent.setup_failed",
        "setup_intent.succeeded",
    ],
) -> _Declare[stripe.SetupIntent]: ...
@overload
def on(
    *patterns: Literal[
        "source.canceled",
        "source.chargeable",
        "source.failed",
        "source.refund_attributes_required",
    ],
) -> _Declare[stripe.Source]: ...
@overload
def on(*patterns: Literal["source.mandate_notification"]) -> _Declare[stripe.SourceMandateNotification]: ...
@overload
def on(
    *patterns: Literal[
        "source.transaction.*",
        "source.transaction.created",
        "source.transaction.updated",
    ],
) -> _Declare[stripe.SourceTransaction]: ...
@overload
def on(
    *patterns: Literal[
        "customer.subscription.*",
        "customer.subscription.created",
        "customer.subscription.deleted",
        "customer.subscription.paused",
        "customer.subscription.pending_update_applied",
        "customer.subscription.pending_update_expired",
        "customer.subscription.resumed",
        "customer.subscription.trial_will_end",
        "customer.subscription.updated",
    ],
) -> _Declare[stripe.Subscription]: ...
@overload
def on(
    *patterns: Literal[
        "subscription_schedule.*",
        "subscription_schedule.aborted",
        "subscription_schedule.canceled",
        "subscription_schedule.completed",
        "subscription_schedule.created",
        "subscription_schedule.expiring",
        "subscription_schedule.released",
        "subscription_schedule.updated",
    ],
) -> _Declare[stripe.SubscriptionSchedule]: ...
@overload
def on(
    *patterns: Literal[
        "customer.tax_id.*",
        "customer.tax_id.created",
        "customer.tax_id.deleted",
        "customer.tax_id.updated",
    ],
) -> _Declare[stripe.TaxId]: ...
@overload
def on(
    *patterns: Literal[
        "tax_rate.*",
        "tax_rate.created",
        "tax_rate.updated",
    ],
) -> _Declare[stripe.TaxRate]: ...
@overload
def on(
    *patterns: Literal[
        "topup.*",
        "topup.canceled",
        "topup.created",
        "topup.failed",
        "topup.reversed",
        "topup.succeeded",
    ],
) -> _Declare[stripe.Topup]: ...
@overload
def on(
    *patterns: Literal[
        "transfer.*",
        "transfer.created",
        "transfer.reversed",
        "transfer.updated",
    ],
) -> _Declare[stripe.Transfer]: ...
@overload
def on(
    *patterns: Literal[
        "apps.*",
        "apps.install.*",
        "apps.install.created",
        "apps.install.deleted",
        "apps.install.updated",
    ],
) -> _Declare[stripe.apps.Install]: ...
@overload
def on(
    *patterns: Literal[
        "billing.alert.*",
        "billing.alert.triggered",
    ],
) -> _Declare[stripe.billing.AlertTriggered]: ...
@overload
def on(
    *patterns: Literal[
        "billing.credit_balance_transaction.*",
        "billing.credit_balance_transaction.created",
    ],
) -> _Declare[stripe.billing.CreditBalanceTransaction]: ...
@overload
def on(
    *patterns: Literal[
        "billing.credit_grant.*",
        "billing.credit_grant.created",
        "billing.credit_grant.updated",
    ],
) -> _Declare[stripe.billing.CreditGrant]: ...
@overload
def on(
    *patterns: Literal[
        "billing.meter.*",
        "billing.meter.created",
        "billing.meter.deactivated",
        "billing.meter.reactivated",
        "billing.meter.updated",
    ],
) -> _Declare[stripe.billing.Meter]: ...
@overload
def on(
    *patterns: Literal[
        "billing_portal.configuration.*",
        "billing_portal.configuration.created",
        "billing_portal.configuration.updated",
    ],
) -> _Declare[stripe.billing_portal.Configuration]: ...
@overload
def on(
    *patterns: Literal[
        "billing_portal.session.*",
        "billing_portal.session.created",
    ],
) -> _Declare[stripe.billing_portal.Session]: ...
@overload
def on(
    *patterns: Literal[
        "checkout.*",
        "checkout.session.*",
        "checkout.session.async_payment_failed",
        "checkout.session.async_payment_succeeded",
        "checkout.session.completed",
        "checkout.session.expired",
    ],
) -> _Declare[stripe.checkout.Session]: ...
@overload
def on(
    *patterns: Literal[
        "climate.order.*",
        "climate.order.canceled",
        "climate.order.created",
        "climate.order.delayed",
        "climate.order.delivered",
        "climate.order.product_substituted",
    ],
) -> _Declare[stripe.climate.Order]: ...
@overload
def on(
    *patterns: Literal[
        "climate.product.*",
        "climate.product.created",
        "climate.product.pricing_updated",
    ],
) -> _Declare[stripe.climate.Product]: ...
@overload
def on(
    *patterns: Literal[
        "entitlements.*",
        "entitlements.active_entitlement_summary.*",
        "entitlements.active_entitlement_summary.updated",
    ],
) -> _Declare[stripe.entitlements.ActiveEntitlementSummary]: ...
@overload
def on(
    *patterns: Literal[
        "financial_connections.account.*",
        "financial_connections.account.account_numbers_updated",
        "financial_connections.account.created",
        "financial_connections.account.deactivated",
        "financial_connections.account.disconnected",
        "financial_connections.account.expected_deactivation_date_updated",
        "financial_connections.account.reactivated",
        "financial_connections.account.refreshed_balance",
        "financial_connections.account.refreshed_ownership",
        "financial_connections.account.refreshed_transactions",
        "financial_connections.account.supported_payment_method_types_updated",
        "financial_connections.account.upcoming_account_number_expiry",
        "financial_connections.account.upcoming_deactivation",
    ],
) -> _Declare[stripe.financial_connections.Account]: ...
@overload
def on(
    *patterns: Literal[
        "financial_connections.authorization.*",
        "financial_connections.authorization.expected_deactivation_date_updated",
        "financial_connections.authorization.upcoming_deactivation",
    ],
) -> _Declare[stripe.financial_connections.Authorization]: ...
@overload
def on(
    *patterns: Literal[
        "identity.*",
        "identity.verification_session.*",
        "identity.verification_session.canceled",
        "identity.verification_session.created",
        "identity.verification_session.processing",
        "identity.verification_session.redacted",
        "identity.verification_session.requires_input",
        "identity.verification_session.verified",
    ],
) -> _Declare[stripe.identity.VerificationSession]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_authorization.*",
        "issuing_authorization.created",
        "issuing_authorization.request",
        "issuing_authorization.updated",
    ],
) -> _Declare[stripe.issuing.Authorization]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_card.*",
        "issuing_card.created",
        "issuing_card.updated",
    ],
) -> _Declare[stripe.issuing.Card]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_cardholder.*",
        "issuing_cardholder.created",
        "issuing_cardholder.updated",
    ],
) -> _Declare[stripe.issuing.Cardholder]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_dispute.*",
        "issuing_dispute.closed",
        "issuing_dispute.created",
        "issuing_dispute.funds_reinstated",
        "issuing_dispute.funds_rescinded",
        "issuing_dispute.submitted",
        "issuing_dispute.updated",
    ],
) -> _Declare[stripe.issuing.Dispute]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_personalization_design.*",
        "issuing_personalization_design.activated",
        "issuing_personalization_design.deactivated",
        "issuing_personalization_design.rejected",
        "issuing_personalization_design.updated",
    ],
) -> _Declare[stripe.issuing.PersonalizationDesign]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_token.*",
        "issuing_token.created",
        "issuing_token.updated",
    ],
) -> _Declare[stripe.issuing.Token]: ...
@overload
def on(
    *patterns: Literal[
        "issuing_transaction.*",
        "issuing_transaction.created",
        "issuing_transaction.purchase_details_receipt_updated",
        "issuing_transaction.updated",
    ],
) -> _Declare[stripe.issuing.Transaction]: ...
@overload
def on(
    *patterns: Literal[
        "radar.*",
        "radar.early_fraud_warning.*",
        "radar.early_fraud_warning.created",
        "radar.early_fraud_warning.updated",
    ],
) -> _Declare[stripe.radar.EarlyFraudWarning]: ...
@overload
def on(
    *patterns: Literal[
        "reporting.report_run.*",
        "reporting.report_run.failed",
        "reporting.report_run.succeeded",
    ],
) -> _Declare[stripe.reporting.ReportRun]: ...
@overload
def on(
    *patterns: Literal[
        "reporting.report_type.*",
        "reporting.report_type.updated",
    ],
) -> _Declare[stripe.reporting.ReportType]: ...
@overload
def on(
    *patterns: Literal[
        "reserve.hold.*",
        "reserve.hold.created",
        "reserve.hold.updated",
    ],
) -> _Declare[stripe.reserve.Hold]: ...
@overload
def on(
    *patterns: Literal[
        "reserve.plan.*",
        "reserve.plan.created",
        "reserve.plan.disabled",
        "reserve.plan.expired",
        "reserve.plan.updated",
    ],
) -> _Declare[stripe.reserve.Plan]: ...
@overload
def on(
    *patterns: Literal[
        "reserve.release.*",
        "reserve.release.created",
    ],
) -> _Declare[stripe.reserve.Release]: ...
@overload
def on(
    *patterns: Literal[
        "sigma.*",
        "sigma.scheduled_query_run.*",
        "sigma.scheduled_query_run.created",
    ],
) -> _Declare[stripe.sigma.ScheduledQueryRun]: ...
@overload
def on(
    *patterns: Literal[
        "tax.*",
        "tax.settings.*",
        "tax.settings.updated",
    ],
) -> _Declare[stripe.tax.Settings]: ...
@overload
def on(
    *patterns: Literal[
        "terminal.*",
        "terminal.reader.*",
        "terminal.reader.action_failed",
        "terminal.reader.action_succeeded",
        "terminal.reader.action_updated",
    ],
) -> _Declare[stripe.terminal.Reader]: ...
@overload
def on(
    *patterns: Literal[
        "test_helpers.*",
        "test_helpers.test_clock.*",
        "test_helpers.test_clock.advancing",
        "test_helpers.test_clock.created",
        "test_helpers.test_clock.deleted",
        "test_helpers.test_clock.internal_failure",
        "test_helpers.test_clock.ready",
    ],
) -> _Declare[stripe.test_helpers.TestClock]: ...
@overload
def on(
    *patterns: Literal[
        "three_d_secure.*",
        "three_d_secure.authentication.*",
        "three_d_secure.authentication.canceled",
        "three_d_secure.authentication.challenge_started",
        "three_d_secure.authentication.errored",
        "three_d_secure.authentication.failed",
        "three_d_secure.authentication.requires_challenge",
        "three_d_secure.authentication.requires_submission",
        "three_d_secure.authentication.succeeded",
    ],
) -> _Declare[stripe.three_d_secure.Authentication]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.credit_reversal.*",
        "treasury.credit_reversal.created",
        "treasury.credit_reversal.posted",
    ],
) -> _Declare[stripe.treasury.CreditReversal]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.debit_reversal.*",
        "treasury.debit_reversal.completed",
        "treasury.debit_reversal.created",
        "treasury.debit_reversal.initial_credit_granted",
    ],
) -> _Declare[stripe.treasury.DebitReversal]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.financial_account.*",
        "treasury.financial_account.closed",
        "treasury.financial_account.created",
        "treasury.financial_account.features_status_updated",
    ],
) -> _Declare[stripe.treasury.FinancialAccount]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.inbound_transfer.*",
        "treasury.inbound_transfer.canceled",
        "treasury.inbound_transfer.created",
        "treasury.inbound_transfer.failed",
        "treasury.inbound_transfer.succeeded",
    ],
) -> _Declare[stripe.treasury.InboundTransfer]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.outbound_payment.*",
        "treasury.outbound_payment.canceled",
        "treasury.outbound_payment.created",
        "treasury.outbound_payment.expected_arrival_date_updated",
        "treasury.outbound_payment.failed",
        "treasury.outbound_payment.posted",
        "treasury.outbound_payment.returned",
        "treasury.outbound_payment.tracking_details_updated",
    ],
) -> _Declare[stripe.treasury.OutboundPayment]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.outbound_transfer.*",
        "treasury.outbound_transfer.canceled",
        "treasury.outbound_transfer.created",
        "treasury.outbound_transfer.expected_arrival_date_updated",
        "treasury.outbound_transfer.failed",
        "treasury.outbound_transfer.posted",
        "treasury.outbound_transfer.returned",
        "treasury.outbound_transfer.tracking_details_updated",
    ],
) -> _Declare[stripe.treasury.OutboundTransfer]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.received_credit.*",
        "treasury.received_credit.created",
        "treasury.received_credit.failed",
        "treasury.received_credit.succeeded",
    ],
) -> _Declare[stripe.treasury.ReceivedCredit]: ...
@overload
def on(
    *patterns: Literal[
        "treasury.received_debit.*",
        "treasury.received_debit.created",
    ],
) -> _Declare[stripe.treasury.ReceivedDebit]: ...
@overload
def on(*patterns: str) -> _Declare[Any]: ...
