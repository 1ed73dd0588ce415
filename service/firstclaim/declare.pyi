"""Generated from stripe-python 16.1.0 by `python -m tests.typed_events`: do not edit."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, Unpack, overload

import stripe

from firstclaim.context import BatchContext, Context
from firstclaim.event import Event
from firstclaim.handler_options import HandlerOptions

__all__ = ["on"]

_O = TypeVar("_O")
_R = TypeVar("_R", bound=str | Awaitable[str | None] | None)
_RB = TypeVar("_RB", bound=str | Sequence[str | None] | Awaitable[str | Sequence[str | None] | None] | None)

class _Options(HandlerOptions, total=False):
    name: str | None
    exclusive: bool

class _OneOptions(_Options, total=False):
    fresh: bool

class _Declare(Protocol[_O]):
    def __call__(self, function: Callable[[Event[_O], Context], _R], /) -> Callable[[Event[_O], Context], _R]: ...

class _DeclareBatch(Protocol[_O]):
    def __call__(
        self, function: Callable[[list[Event[_O]], BatchContext], _RB], /
    ) -> Callable[[list[Event[_O]], BatchContext], _RB]: ...

_Account: TypeAlias = Literal["account.updated"]
_AccountOrBankAccountOrCardOrSource: TypeAlias = Literal[
    "customer.source.*",
    "customer.source.created",
    "customer.source.deleted",
    "customer.source.expiring",
    "customer.source.updated",
]
_Application: TypeAlias = Literal[
    "account.application.*",
    "account.application.authorized",
    "account.application.deauthorized",
]
_ApplicationFee: TypeAlias = Literal[
    "application_fee.created",
    "application_fee.refunded",
]
_ApplicationFeeRefund: TypeAlias = Literal[
    "application_fee.refund.*",
    "application_fee.refund.updated",
]
_Balance: TypeAlias = Literal[
    "balance.*",
    "balance.available",
]
_BalanceSettings: TypeAlias = Literal[
    "balance_settings.*",
    "balance_settings.updated",
]
_BankAccountOrCard: TypeAlias = Literal[
    "account.external_account.*",
    "account.external_account.created",
    "account.external_account.deleted",
    "account.external_account.updated",
]
_Capability: TypeAlias = Literal[
    "capability.*",
    "capability.updated",
]
_CashBalance: TypeAlias = Literal[
    "cash_balance.*",
    "cash_balance.funds_available",
]
_Charge: TypeAlias = Literal[
    "charge.captured",
    "charge.expired",
    "charge.failed",
    "charge.pending",
    "charge.refunded",
    "charge.succeeded",
    "charge.updated",
]
_Coupon: TypeAlias = Literal[
    "coupon.*",
    "coupon.created",
    "coupon.deleted",
    "coupon.updated",
]
_CreditNote: TypeAlias = Literal[
    "credit_note.*",
    "credit_note.created",
    "credit_note.updated",
    "credit_note.voided",
]
_Customer: TypeAlias = Literal[
    "customer.created",
    "customer.deleted",
    "customer.updated",
]
_CustomerCashBalanceTransaction: TypeAlias = Literal[
    "customer_cash_balance_transaction.*",
    "customer_cash_balance_transaction.created",
]
_Discount: TypeAlias = Literal[
    "customer.discount.*",
    "customer.discount.created",
    "customer.discount.deleted",
    "customer.discount.updated",
]
_Dispute: TypeAlias = Literal[
    "charge.dispute.*",
    "charge.dispute.closed",
    "charge.dispute.created",
    "charge.dispute.funds_reinstated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
]
_File: TypeAlias = Literal[
    "file.*",
    "file.created",
]
_Invoice: TypeAlias = Literal[
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
]
_InvoiceItem: TypeAlias = Literal[
    "invoiceitem.*",
    "invoiceitem.created",
    "invoiceitem.deleted",
]
_InvoicePayment: TypeAlias = Literal[
    "invoice_payment.*",
    "invoice_payment.paid",
]
_Mandate: TypeAlias = Literal[
    "mandate.*",
    "mandate.updated",
]
_PaymentIntent: TypeAlias = Literal[
    "payment_intent.*",
    "payment_intent.amount_capturable_updated",
    "payment_intent.canceled",
    "payment_intent.created",
    "payment_intent.partially_funded",
    "payment_intent.payment_failed",
    "payment_intent.processing",
    "payment_intent.requires_action",
    "payment_intent.succeeded",
]
_PaymentLink: TypeAlias = Literal[
    "payment_link.*",
    "payment_link.created",
    "payment_link.updated",
]
_PaymentMethod: TypeAlias = Literal[
    "payment_method.*",
    "payment_method.attached",
    "payment_method.automatically_updated",
    "payment_method.detached",
    "payment_method.updated",
]
_Payout: TypeAlias = Literal[
    "payout.*",
    "payout.canceled",
    "payout.created",
    "payout.failed",
    "payout.paid",
    "payout.reconciliation_completed",
    "payout.updated",
]
_Person: TypeAlias = Literal[
    "person.*",
    "person.created",
    "person.deleted",
    "person.updated",
]
_Plan: TypeAlias = Literal[
    "plan.*",
    "plan.created",
    "plan.deleted",
    "plan.updated",
]
_Price: TypeAlias = Literal[
    "price.*",
    "price.created",
    "price.deleted",
    "price.updated",
]
_Product: TypeAlias = Literal[
    "product.*",
    "product.created",
    "product.deleted",
    "product.updated",
]
_PromotionCode: TypeAlias = Literal[
    "promotion_code.*",
    "promotion_code.created",
    "promotion_code.updated",
]
_Quote: TypeAlias = Literal[
    "quote.*",
    "quote.accepted",
    "quote.canceled",
    "quote.created",
    "quote.finalized",
]
_Refund: TypeAlias = Literal[
    "charge.refund.*",
    "charge.refund.updated",
    "refund.*",
    "refund.created",
    "refund.failed",
    "refund.updated",
]
_Review: TypeAlias = Literal[
    "review.*",
    "review.closed",
    "review.opened",
]
_SetupIntent: TypeAlias = Literal[
    "setup_intent.*",
    "setup_intent.canceled",
    "setup_intent.created",
    "setup_intent.requires_action",
    "setup_intent.setup_failed",
    "setup_intent.succeeded",
]
_Source: TypeAlias = Literal[
    "source.canceled",
    "source.chargeable",
    "source.failed",
    "source.refund_attributes_required",
]
_SourceMandateNotification: TypeAlias = Literal["source.mandate_notification"]
_SourceTransaction: TypeAlias = Literal[
    "source.transaction.*",
    "source.transaction.created",
    "source.transaction.updated",
]
_Subscription: TypeAlias = Literal[
    "customer.subscription.*",
    "customer.subscription.created",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
    "customer.subscription.resumed",
    "customer.subscription.trial_will_end",
    "customer.subscription.updated",
]
_SubscriptionSchedule: TypeAlias = Literal[
    "subscription_schedule.*",
    "subscription_schedule.aborted",
    "subscription_schedule.canceled",
    "subscription_schedule.completed",
    "subscription_schedule.created",
    "subscription_schedule.expiring",
    "subscription_schedule.released",
    "subscription_schedule.updated",
]
_TaxId: TypeAlias = Literal[
    "customer.tax_id.*",
    "customer.tax_id.created",
    "customer.tax_id.deleted",
    "customer.tax_id.updated",
]
_TaxRate: TypeAlias = Literal[
    "tax_rate.*",
    "tax_rate.created",
    "tax_rate.updated",
]
_Topup: TypeAlias = Literal[
    "topup.*",
    "topup.canceled",
    "topup.created",
    "topup.failed",
    "topup.reversed",
    "topup.succeeded",
]
_Transfer: TypeAlias = Literal[
    "transfer.*",
    "transfer.created",
    "transfer.reversed",
    "transfer.updated",
]
_AppsInstall: TypeAlias = Literal[
    "apps.*",
    "apps.install.*",
    "apps.install.created",
    "apps.install.deleted",
    "apps.install.updated",
]
_BillingAlertTriggered: TypeAlias = Literal[
    "billing.alert.*",
    "billing.alert.triggered",
]
_BillingCreditBalanceTransaction: TypeAlias = Literal[
    "billing.credit_balance_transaction.*",
    "billing.credit_balance_transaction.created",
]
_BillingCreditGrant: TypeAlias = Literal[
    "billing.credit_grant.*",
    "billing.credit_grant.created",
    "billing.credit_grant.updated",
]
_BillingMeter: TypeAlias = Literal[
    "billing.meter.*",
    "billing.meter.created",
    "billing.meter.deactivated",
    "billing.meter.reactivated",
    "billing.meter.updated",
]
_Billing_portalConfiguration: TypeAlias = Literal[
    "billing_portal.configuration.*",
    "billing_portal.configuration.created",
    "billing_portal.configuration.updated",
]
_Billing_portalSession: TypeAlias = Literal[
    "billing_portal.session.*",
    "billing_portal.session.created",
]
_CheckoutSession: TypeAlias = Literal[
    "checkout.*",
    "checkout.session.*",
    "checkout.session.async_payment_failed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.completed",
    "checkout.session.expired",
]
_ClimateOrder: TypeAlias = Literal[
    "climate.order.*",
    "climate.order.canceled",
    "climate.order.created",
    "climate.order.delayed",
    "climate.order.delivered",
    "climate.order.product_substituted",
]
_ClimateProduct: TypeAlias = Literal[
    "climate.product.*",
    "climate.product.created",
    "climate.product.pricing_updated",
]
_EntitlementsActiveEntitlementSummary: TypeAlias = Literal[
    "entitlements.*",
    "entitlements.active_entitlement_summary.*",
    "entitlements.active_entitlement_summary.updated",
]
_Financial_connectionsAccount: TypeAlias = Literal[
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
]
_Financial_connectionsAuthorization: TypeAlias = Literal[
    "financial_connections.authorization.*",
    "financial_connections.authorization.expected_deactivation_date_updated",
    "financial_connections.authorization.upcoming_deactivation",
]
_IdentityVerificationSession: TypeAlias = Literal[
    "identity.*",
    "identity.verification_session.*",
    "identity.verification_session.canceled",
    "identity.verification_session.created",
    "identity.verification_session.processing",
    "identity.verification_session.redacted",
    "identity.verification_session.requires_input",
    "identity.verification_session.verified",
]
_IssuingAuthorization: TypeAlias = Literal[
    "issuing_authorization.*",
    "issuing_authorization.created",
    "issuing_authorization.request",
    "issuing_authorization.updated",
]
_IssuingCard: TypeAlias = Literal[
    "issuing_card.*",
    "issuing_card.created",
    "issuing_card.updated",
]
_IssuingCardholder: TypeAlias = Literal[
    "issuing_cardholder.*",
    "issuing_cardholder.created",
    "issuing_cardholder.updated",
]
_IssuingDispute: TypeAlias = Literal[
    "issuing_dispute.*",
    "issuing_dispute.closed",
    "issuing_dispute.created",
    "issuing_dispute.funds_reinstated",
    "issuing_dispute.funds_rescinded",
    "issuing_dispute.submitted",
    "issuing_dispute.updated",
]
_IssuingPersonalizationDesign: TypeAlias = Literal[
    "issuing_personalization_design.*",
    "issuing_personalization_design.activated",
    "issuing_personalization_design.deactivated",
    "issuing_personalization_design.rejected",
    "issuing_personalization_design.updated",
]
_IssuingToken: TypeAlias = Literal[
    "issuing_token.*",
    "issuing_token.created",
    "issuing_token.updated",
]
_IssuingTransaction: TypeAlias = Literal[
    "issuing_transaction.*",
    "issuing_transaction.created",
    "issuing_transaction.purchase_details_receipt_updated",
    "issuing_transaction.updated",
]
_RadarEarlyFraudWarning: TypeAlias = Literal[
    "radar.*",
    "radar.early_fraud_warning.*",
    "radar.early_fraud_warning.created",
    "radar.early_fraud_warning.updated",
]
_ReportingReportRun: TypeAlias = Literal[
    "reporting.report_run.*",
    "reporting.report_run.failed",
    "reporting.report_run.succeeded",
]
_ReportingReportType: TypeAlias = Literal[
    "reporting.report_type.*",
    "reporting.report_type.updated",
]
_ReserveHold: TypeAlias = Literal[
    "reserve.hold.*",
    "reserve.hold.created",
    "reserve.hold.updated",
]
_ReservePlan: TypeAlias = Literal[
    "reserve.plan.*",
    "reserve.plan.created",
    "reserve.plan.disabled",
    "reserve.plan.expired",
    "reserve.plan.updated",
]
_ReserveRelease: TypeAlias = Literal[
    "reserve.release.*",
    "reserve.release.created",
]
_SigmaScheduledQueryRun: TypeAlias = Literal[
    "sigma.*",
    "sigma.scheduled_query_run.*",
    "sigma.scheduled_query_run.created",
]
_TaxSettings: TypeAlias = Literal[
    "tax.*",
    "tax.settings.*",
    "tax.settings.updated",
]
_TerminalReader: TypeAlias = Literal[
    "terminal.*",
    "terminal.reader.*",
    "terminal.reader.action_failed",
    "terminal.reader.action_succeeded",
    "terminal.reader.action_updated",
]
_Test_helpersTestClock: TypeAlias = Literal[
    "test_helpers.*",
    "test_helpers.test_clock.*",
    "test_helpers.test_clock.advancing",
    "test_helpers.test_clock.created",
    "test_helpers.test_clock.deleted",
    "test_helpers.test_clock.internal_failure",
    "test_helpers.test_clock.ready",
]
_Three_d_secureAuthentication: TypeAlias = Literal[
    "three_d_secure.*",
    "three_d_secure.authentication.*",
    "three_d_secure.authentication.canceled",
    "three_d_secure.authentication.challenge_started",
    "three_d_secure.authentication.errored",
    "three_d_secure.authentication.failed",
    "three_d_secure.authentication.requires_challenge",
    "three_d_secure.authentication.requires_submission",
    "three_d_secure.authentication.succeeded",
]
_TreasuryCreditReversal: TypeAlias = Literal[
    "treasury.credit_reversal.*",
    "treasury.credit_reversal.created",
    "treasury.credit_reversal.posted",
]
_TreasuryDebitReversal: TypeAlias = Literal[
    "treasury.debit_reversal.*",
    "treasury.debit_reversal.completed",
    "treasury.debit_reversal.created",
    "treasury.debit_reversal.initial_credit_granted",
]
_TreasuryFinancialAccount: TypeAlias = Literal[
    "treasury.financial_account.*",
    "treasury.financial_account.closed",
    "treasury.financial_account.created",
    "treasury.financial_account.features_status_updated",
]
_TreasuryInboundTransfer: TypeAlias = Literal[
    "treasury.inbound_transfer.*",
    "treasury.inbound_transfer.canceled",
    "treasury.inbound_transfer.created",
    "treasury.inbound_transfer.failed",
    "treasury.inbound_transfer.succeeded",
]
_TreasuryOutboundPayment: TypeAlias = Literal[
    "treasury.outbound_payment.*",
    "treasury.outbound_payment.canceled",
    "treasury.outbound_payment.created",
    "treasury.outbound_payment.expected_arrival_date_updated",
    "treasury.outbound_payment.failed",
    "treasury.outbound_payment.posted",
    "treasury.outbound_payment.returned",
    "treasury.outbound_payment.tracking_details_updated",
]
_TreasuryOutboundTransfer: TypeAlias = Literal[
    "treasury.outbound_transfer.*",
    "treasury.outbound_transfer.canceled",
    "treasury.outbound_transfer.created",
    "treasury.outbound_transfer.expected_arrival_date_updated",
    "treasury.outbound_transfer.failed",
    "treasury.outbound_transfer.posted",
    "treasury.outbound_transfer.returned",
    "treasury.outbound_transfer.tracking_details_updated",
]
_TreasuryReceivedCredit: TypeAlias = Literal[
    "treasury.received_credit.*",
    "treasury.received_credit.created",
    "treasury.received_credit.failed",
    "treasury.received_credit.succeeded",
]
_TreasuryReceivedDebit: TypeAlias = Literal[
    "treasury.received_debit.*",
    "treasury.received_debit.created",
]

@overload
def on(
    *patterns: _Account, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Account]: ...
@overload
def on(*patterns: _Account, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Account]: ...
@overload
def on(
    *patterns: _AccountOrBankAccountOrCardOrSource, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Account | stripe.BankAccount | stripe.Card | stripe.Source]: ...
@overload
def on(
    *patterns: _AccountOrBankAccountOrCardOrSource, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.Account | stripe.BankAccount | stripe.Card | stripe.Source]: ...
@overload
def on(
    *patterns: _Application, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Application]: ...
@overload
def on(
    *patterns: _Application, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.Application]: ...
@overload
def on(
    *patterns: _ApplicationFee, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.ApplicationFee]: ...
@overload
def on(
    *patterns: _ApplicationFee, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.ApplicationFee]: ...
@overload
def on(
    *patterns: _ApplicationFeeRefund, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.ApplicationFeeRefund]: ...
@overload
def on(
    *patterns: _ApplicationFeeRefund, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.ApplicationFeeRefund]: ...
@overload
def on(
    *patterns: _Balance, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Balance]: ...
@overload
def on(*patterns: _Balance, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Balance]: ...
@overload
def on(
    *patterns: _BalanceSettings, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.BalanceSettings]: ...
@overload
def on(
    *patterns: _BalanceSettings, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.BalanceSettings]: ...
@overload
def on(
    *patterns: _BankAccountOrCard, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.BankAccount | stripe.Card]: ...
@overload
def on(
    *patterns: _BankAccountOrCard, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.BankAccount | stripe.Card]: ...
@overload
def on(
    *patterns: _Capability, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Capability]: ...
@overload
def on(
    *patterns: _Capability, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.Capability]: ...
@overload
def on(
    *patterns: _CashBalance, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.CashBalance]: ...
@overload
def on(
    *patterns: _CashBalance, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.CashBalance]: ...
@overload
def on(
    *patterns: _Charge, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Charge]: ...
@overload
def on(*patterns: _Charge, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Charge]: ...
@overload
def on(
    *patterns: _Coupon, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Coupon]: ...
@overload
def on(*patterns: _Coupon, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Coupon]: ...
@overload
def on(
    *patterns: _CreditNote, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.CreditNote]: ...
@overload
def on(
    *patterns: _CreditNote, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.CreditNote]: ...
@overload
def on(
    *patterns: _Customer, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Customer]: ...
@overload
def on(*patterns: _Customer, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Customer]: ...
@overload
def on(
    *patterns: _CustomerCashBalanceTransaction, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.CustomerCashBalanceTransaction]: ...
@overload
def on(
    *patterns: _CustomerCashBalanceTransaction, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.CustomerCashBalanceTransaction]: ...
@overload
def on(
    *patterns: _Discount, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Discount]: ...
@overload
def on(*patterns: _Discount, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Discount]: ...
@overload
def on(
    *patterns: _Dispute, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Dispute]: ...
@overload
def on(*patterns: _Dispute, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Dispute]: ...
@overload
def on(*patterns: _File, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.File]: ...
@overload
def on(*patterns: _File, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.File]: ...
@overload
def on(
    *patterns: _Invoice, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Invoice]: ...
@overload
def on(*patterns: _Invoice, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Invoice]: ...
@overload
def on(
    *patterns: _InvoiceItem, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.InvoiceItem]: ...
@overload
def on(
    *patterns: _InvoiceItem, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.InvoiceItem]: ...
@overload
def on(
    *patterns: _InvoicePayment, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.InvoicePayment]: ...
@overload
def on(
    *patterns: _InvoicePayment, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.InvoicePayment]: ...
@overload
def on(
    *patterns: _Mandate, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Mandate]: ...
@overload
def on(*patterns: _Mandate, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Mandate]: ...
@overload
def on(
    *patterns: _PaymentIntent, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.PaymentIntent]: ...
@overload
def on(
    *patterns: _PaymentIntent, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.PaymentIntent]: ...
@overload
def on(
    *patterns: _PaymentLink, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.PaymentLink]: ...
@overload
def on(
    *patterns: _PaymentLink, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.PaymentLink]: ...
@overload
def on(
    *patterns: _PaymentMethod, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.PaymentMethod]: ...
@overload
def on(
    *patterns: _PaymentMethod, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.PaymentMethod]: ...
@overload
def on(
    *patterns: _Payout, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Payout]: ...
@overload
def on(*patterns: _Payout, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Payout]: ...
@overload
def on(
    *patterns: _Person, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Person]: ...
@overload
def on(*patterns: _Person, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Person]: ...
@overload
def on(*patterns: _Plan, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.Plan]: ...
@overload
def on(*patterns: _Plan, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Plan]: ...
@overload
def on(*patterns: _Price, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.Price]: ...
@overload
def on(*patterns: _Price, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Price]: ...
@overload
def on(
    *patterns: _Product, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Product]: ...
@overload
def on(*patterns: _Product, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Product]: ...
@overload
def on(
    *patterns: _PromotionCode, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.PromotionCode]: ...
@overload
def on(
    *patterns: _PromotionCode, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.PromotionCode]: ...
@overload
def on(*patterns: _Quote, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.Quote]: ...
@overload
def on(*patterns: _Quote, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Quote]: ...
@overload
def on(
    *patterns: _Refund, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Refund]: ...
@overload
def on(*patterns: _Refund, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Refund]: ...
@overload
def on(
    *patterns: _Review, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Review]: ...
@overload
def on(*patterns: _Review, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Review]: ...
@overload
def on(
    *patterns: _SetupIntent, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.SetupIntent]: ...
@overload
def on(
    *patterns: _SetupIntent, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.SetupIntent]: ...
@overload
def on(
    *patterns: _Source, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Source]: ...
@overload
def on(*patterns: _Source, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Source]: ...
@overload
def on(
    *patterns: _SourceMandateNotification, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.SourceMandateNotification]: ...
@overload
def on(
    *patterns: _SourceMandateNotification, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.SourceMandateNotification]: ...
@overload
def on(
    *patterns: _SourceTransaction, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.SourceTransaction]: ...
@overload
def on(
    *patterns: _SourceTransaction, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.SourceTransaction]: ...
@overload
def on(
    *patterns: _Subscription, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Subscription]: ...
@overload
def on(
    *patterns: _Subscription, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.Subscription]: ...
@overload
def on(
    *patterns: _SubscriptionSchedule, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.SubscriptionSchedule]: ...
@overload
def on(
    *patterns: _SubscriptionSchedule, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.SubscriptionSchedule]: ...
@overload
def on(*patterns: _TaxId, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.TaxId]: ...
@overload
def on(*patterns: _TaxId, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.TaxId]: ...
@overload
def on(
    *patterns: _TaxRate, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.TaxRate]: ...
@overload
def on(*patterns: _TaxRate, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.TaxRate]: ...
@overload
def on(*patterns: _Topup, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[stripe.Topup]: ...
@overload
def on(*patterns: _Topup, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Topup]: ...
@overload
def on(
    *patterns: _Transfer, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.Transfer]: ...
@overload
def on(*patterns: _Transfer, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[stripe.Transfer]: ...
@overload
def on(
    *patterns: _AppsInstall, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.apps.Install]: ...
@overload
def on(
    *patterns: _AppsInstall, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.apps.Install]: ...
@overload
def on(
    *patterns: _BillingAlertTriggered, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing.AlertTriggered]: ...
@overload
def on(
    *patterns: _BillingAlertTriggered, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing.AlertTriggered]: ...
@overload
def on(
    *patterns: _BillingCreditBalanceTransaction, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing.CreditBalanceTransaction]: ...
@overload
def on(
    *patterns: _BillingCreditBalanceTransaction, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing.CreditBalanceTransaction]: ...
@overload
def on(
    *patterns: _BillingCreditGrant, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing.CreditGrant]: ...
@overload
def on(
    *patterns: _BillingCreditGrant, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing.CreditGrant]: ...
@overload
def on(
    *patterns: _BillingMeter, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing.Meter]: ...
@overload
def on(
    *patterns: _BillingMeter, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing.Meter]: ...
@overload
def on(
    *patterns: _Billing_portalConfiguration, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing_portal.Configuration]: ...
@overload
def on(
    *patterns: _Billing_portalConfiguration, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing_portal.Configuration]: ...
@overload
def on(
    *patterns: _Billing_portalSession, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.billing_portal.Session]: ...
@overload
def on(
    *patterns: _Billing_portalSession, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.billing_portal.Session]: ...
@overload
def on(
    *patterns: _CheckoutSession, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.checkout.Session]: ...
@overload
def on(
    *patterns: _CheckoutSession, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.checkout.Session]: ...
@overload
def on(
    *patterns: _ClimateOrder, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.climate.Order]: ...
@overload
def on(
    *patterns: _ClimateOrder, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.climate.Order]: ...
@overload
def on(
    *patterns: _ClimateProduct, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.climate.Product]: ...
@overload
def on(
    *patterns: _ClimateProduct, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.climate.Product]: ...
@overload
def on(
    *patterns: _EntitlementsActiveEntitlementSummary, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.entitlements.ActiveEntitlementSummary]: ...
@overload
def on(
    *patterns: _EntitlementsActiveEntitlementSummary, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.entitlements.ActiveEntitlementSummary]: ...
@overload
def on(
    *patterns: _Financial_connectionsAccount, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.financial_connections.Account]: ...
@overload
def on(
    *patterns: _Financial_connectionsAccount, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.financial_connections.Account]: ...
@overload
def on(
    *patterns: _Financial_connectionsAuthorization, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.financial_connections.Authorization]: ...
@overload
def on(
    *patterns: _Financial_connectionsAuthorization, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.financial_connections.Authorization]: ...
@overload
def on(
    *patterns: _IdentityVerificationSession, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.identity.VerificationSession]: ...
@overload
def on(
    *patterns: _IdentityVerificationSession, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.identity.VerificationSession]: ...
@overload
def on(
    *patterns: _IssuingAuthorization, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Authorization]: ...
@overload
def on(
    *patterns: _IssuingAuthorization, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Authorization]: ...
@overload
def on(
    *patterns: _IssuingCard, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Card]: ...
@overload
def on(
    *patterns: _IssuingCard, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Card]: ...
@overload
def on(
    *patterns: _IssuingCardholder, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Cardholder]: ...
@overload
def on(
    *patterns: _IssuingCardholder, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Cardholder]: ...
@overload
def on(
    *patterns: _IssuingDispute, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Dispute]: ...
@overload
def on(
    *patterns: _IssuingDispute, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Dispute]: ...
@overload
def on(
    *patterns: _IssuingPersonalizationDesign, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.PersonalizationDesign]: ...
@overload
def on(
    *patterns: _IssuingPersonalizationDesign, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.PersonalizationDesign]: ...
@overload
def on(
    *patterns: _IssuingToken, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Token]: ...
@overload
def on(
    *patterns: _IssuingToken, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Token]: ...
@overload
def on(
    *patterns: _IssuingTransaction, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.issuing.Transaction]: ...
@overload
def on(
    *patterns: _IssuingTransaction, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.issuing.Transaction]: ...
@overload
def on(
    *patterns: _RadarEarlyFraudWarning, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.radar.EarlyFraudWarning]: ...
@overload
def on(
    *patterns: _RadarEarlyFraudWarning, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.radar.EarlyFraudWarning]: ...
@overload
def on(
    *patterns: _ReportingReportRun, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.reporting.ReportRun]: ...
@overload
def on(
    *patterns: _ReportingReportRun, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.reporting.ReportRun]: ...
@overload
def on(
    *patterns: _ReportingReportType, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.reporting.ReportType]: ...
@overload
def on(
    *patterns: _ReportingReportType, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.reporting.ReportType]: ...
@overload
def on(
    *patterns: _ReserveHold, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.reserve.Hold]: ...
@overload
def on(
    *patterns: _ReserveHold, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.reserve.Hold]: ...
@overload
def on(
    *patterns: _ReservePlan, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.reserve.Plan]: ...
@overload
def on(
    *patterns: _ReservePlan, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.reserve.Plan]: ...
@overload
def on(
    *patterns: _ReserveRelease, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.reserve.Release]: ...
@overload
def on(
    *patterns: _ReserveRelease, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.reserve.Release]: ...
@overload
def on(
    *patterns: _SigmaScheduledQueryRun, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.sigma.ScheduledQueryRun]: ...
@overload
def on(
    *patterns: _SigmaScheduledQueryRun, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.sigma.ScheduledQueryRun]: ...
@overload
def on(
    *patterns: _TaxSettings, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.tax.Settings]: ...
@overload
def on(
    *patterns: _TaxSettings, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.tax.Settings]: ...
@overload
def on(
    *patterns: _TerminalReader, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.terminal.Reader]: ...
@overload
def on(
    *patterns: _TerminalReader, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.terminal.Reader]: ...
@overload
def on(
    *patterns: _Test_helpersTestClock, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.test_helpers.TestClock]: ...
@overload
def on(
    *patterns: _Test_helpersTestClock, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.test_helpers.TestClock]: ...
@overload
def on(
    *patterns: _Three_d_secureAuthentication, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.three_d_secure.Authentication]: ...
@overload
def on(
    *patterns: _Three_d_secureAuthentication, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.three_d_secure.Authentication]: ...
@overload
def on(
    *patterns: _TreasuryCreditReversal, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.CreditReversal]: ...
@overload
def on(
    *patterns: _TreasuryCreditReversal, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.CreditReversal]: ...
@overload
def on(
    *patterns: _TreasuryDebitReversal, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.DebitReversal]: ...
@overload
def on(
    *patterns: _TreasuryDebitReversal, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.DebitReversal]: ...
@overload
def on(
    *patterns: _TreasuryFinancialAccount, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.FinancialAccount]: ...
@overload
def on(
    *patterns: _TreasuryFinancialAccount, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.FinancialAccount]: ...
@overload
def on(
    *patterns: _TreasuryInboundTransfer, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.InboundTransfer]: ...
@overload
def on(
    *patterns: _TreasuryInboundTransfer, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.InboundTransfer]: ...
@overload
def on(
    *patterns: _TreasuryOutboundPayment, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.OutboundPayment]: ...
@overload
def on(
    *patterns: _TreasuryOutboundPayment, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.OutboundPayment]: ...
@overload
def on(
    *patterns: _TreasuryOutboundTransfer, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.OutboundTransfer]: ...
@overload
def on(
    *patterns: _TreasuryOutboundTransfer, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.OutboundTransfer]: ...
@overload
def on(
    *patterns: _TreasuryReceivedCredit, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.ReceivedCredit]: ...
@overload
def on(
    *patterns: _TreasuryReceivedCredit, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.ReceivedCredit]: ...
@overload
def on(
    *patterns: _TreasuryReceivedDebit, batch: Literal[False] = False, **options: Unpack[_OneOptions]
) -> _Declare[stripe.treasury.ReceivedDebit]: ...
@overload
def on(
    *patterns: _TreasuryReceivedDebit, batch: Literal[True], **options: Unpack[_Options]
) -> _DeclareBatch[stripe.treasury.ReceivedDebit]: ...
@overload
def on(*patterns: str, batch: Literal[False] = False, **options: Unpack[_OneOptions]) -> _Declare[Any]: ...
@overload
def on(*patterns: str, batch: Literal[True], **options: Unpack[_Options]) -> _DeclareBatch[Any]: ...
