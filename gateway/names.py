"""The names that dashboards, tests and clients rely on: paths, headers, reasons and metrics."""

from __future__ import annotations

CHAT_PATH = "/v1/chat/completions"

REQUEST_ID_HEADER = "x-request-id"
RETRY_COUNT_HEADER = "x-stainless-retry-count"

TASK_HEADER = "x-understudy-task"
ROUTE_HEADER = "x-understudy-route"
REASON_HEADER = "x-understudy-reason"
RELEASE_HEADER = "x-understudy-release"
CONFIDENCE_HEADER = "x-understudy-confidence"
COST_HEADER = "x-understudy-cost-usd"
OWN_HEADER_PREFIX = "x-understudy-"

REASON_NO_RELEASE = "no_release"
REASON_UNSUPPORTED = "unsupported"
REASON_UNVERIFIED_KEY = "unverified_key"
REASON_STUDENT_ERROR = "student_error"
REASON_TEACHER_UNAVAILABLE = "teacher_unavailable"
REASON_FORCED = "forced"
REASON_PASSTHROUGH = "passthrough"
REASON_REFUSED = "refused"

METRIC_REQUESTS = "understudy_requests_total"
METRIC_DURATION = "understudy_request_duration_seconds"
METRIC_OVERHEAD = "understudy_overhead_seconds"
METRIC_FIRST_TOKEN = "understudy_time_to_first_token_seconds"  # noqa: S105
METRIC_TOKENS = "understudy_tokens_total"
METRIC_COST = "understudy_cost_usd_total"
METRIC_REQUEST_COST = "understudy_request_cost_usd"
METRIC_COST_AVOIDED = "understudy_cost_avoided_usd_total"
METRIC_CONFIDENCE = "understudy_confidence"
METRIC_THRESHOLD = "understudy_threshold"
METRIC_AUDITS = "understudy_audits_total"
METRIC_LOGGED = "understudy_exchanges_logged_total"
METRIC_LOST = "understudy_exchanges_lost_total"
METRIC_UPSTREAM_ERRORS = "understudy_upstream_errors_total"
METRIC_RELEASE = "understudy_release_info"
