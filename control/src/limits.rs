//! Every limit of the control plane, and why it is what it is.

/// Where control listens unless configured.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:7410";

/// Time between a worker's heartbeats unless configured: operators see a change within seconds, and a
/// fleet of 1,000 workers costs 1,000 small messages a second.
pub const HEARTBEAT_MS_DEFAULT: u64 = 1_000;

/// Time that one window of load covers, unless configured: policies decide by minutes, operators look by
/// seconds.
pub const WINDOW_MS_DEFAULT: u64 = 10_000;

/// How long windows are kept before they become hours, unless configured: a day of 61 layers of 256
/// experts in two phases takes a gigabyte.
pub const WINDOWS_HOURS_DEFAULT: u64 = 24;

/// How long hours are kept, unless configured: a quarter shows every weekly pattern, and takes less than
/// the day of windows.
pub const HOURS_DAYS_DEFAULT: u64 = 90;

/// How often what is old becomes hours, and what is too old is forgotten.
pub const FORGET_SECONDS: u64 = 600;

/// Longest wait for all ranks of a group to close a window: they look for it ten times a second, and may
/// have others to tell first.
pub const CLOSE_SECONDS_MAX: u64 = 10;

/// How long after its end a window counts as told by all ranks, at most: half of its length, and what a
/// worker on a busy host may be late.
pub const SETTLED_MS: u64 = 2_000;

/// Age at which the newest window is no news any more, and metrics leave it out.
pub const STALE_MS: u64 = 60_000;

/// Windows of a layer and phase that balancedness is computed over at most: hours of 61 layers, in which
/// a request takes half a second.
pub const BALANCE_ROWS_MAX: usize = 50_000;

/// Workers' sessions that may be open at once.
pub const SESSIONS_MAX: u32 = 4_096;

/// How long control waits at its end for sessions to write what they know.
pub const FAREWELL_SECONDS: u64 = 5;

/// Commands that may wait for a session.
pub const COMMANDS_MAX: usize = 64;

/// Largest count of a window: the sum of a thousand such is still exact in JSON readers.
pub const COUNT_MAX: u64 = 1 << 43;

/// Heartbeats that may fail to come before a worker counts as lost: one may be late on a busy host.
pub const HEARTBEATS_MISSED_MAX: u64 = 3;

/// Longest wait for a worker's first message.
pub const REGISTER_SECONDS_MAX: u64 = 10;

/// Bytes of a message: a registration of 4,096 layers has about a megabyte.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Bytes of a request's body with a component: the largest that policies may have.
pub const COMPONENT_BYTES_MAX: usize = 32 << 20;

/// Ranks of a group. Beyond one host a group may have hundreds.
pub const RANKS_MAX: u32 = 1_024;

/// Letters of a group's name.
pub const NAME_BYTES_MAX: usize = 64;

/// Requests of one caller in a second, unless configured: a page that follows everything makes ten.
pub const REQUESTS_PER_SECOND_DEFAULT: u32 = 500;

/// How many of them may come at once: seconds' worth.
pub const BURST_SECONDS: u32 = 2;

/// Callers that are told apart when requests are counted; the others share.
pub const CALLERS_COUNTED_MAX: usize = 4_096;

/// How long a TLS handshake may take, and how many may run at once.
pub const HANDSHAKE_SECONDS_MAX: u64 = 10;
/// See above.
pub const HANDSHAKES_MAX: usize = 256;

/// Bytes of an idempotency key.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// Requests with such a key that may run at once.
pub const KEYED_AT_ONCE_MAX: usize = 1_024;

/// How long an answer is repeated under its key: longer than anybody retries.
pub const ANSWER_HOURS: u64 = 24;

/// Events that are kept for those who come back: a day of a busy fleet.
pub const EVENTS_MAX: i64 = 100_000;

/// Events that are read at once for one who watches.
pub const EVENTS_AT_ONCE: u32 = 100;

/// Those who may watch at once.
pub const WATCHERS_MAX: usize = 256;

/// How long one watches before it has to ask again, and show its token again.
pub const WATCH_SECONDS_MAX: u64 = 900;

/// Time between two comments of a quiet stream of events, unless configured; proxies that close quiet
/// connections do so after 15 s and more.
pub const KEEPALIVE_MS_DEFAULT: u64 = 10_000;

/// How often control looks whether a window has settled, to tell those who watch.
pub const SETTLED_TICK_MS: u64 = 500;

/// Bytes of a reason.
pub const REASON_BYTES_MAX: usize = 1_000;

/// Bytes of a token's name.
pub const TOKEN_NAME_BYTES_MAX: usize = 128;

/// Items of a page of an answer, unless asked for fewer.
pub const PAGE_DEFAULT: usize = 100;

/// Most items of a page.
pub const PAGE_MAX: usize = 500;

/// How long a proposal may be approved unless asked otherwise: load drifts.
pub const PROPOSAL_SECONDS_DEFAULT: u64 = 3_600;

/// Longest time that may be asked for: a window of change that was planned a week ahead.
pub const PROPOSAL_SECONDS_MAX: u64 = 7 * 86_400;

/// Proposals among which control looks for one that says the same: those of an hour in which it asks each minute.
pub const OPEN_PROPOSALS_LOOKED_AT: usize = 60;

/// How often control looks at least whether ranks are to be told something about placements: orders that were lost come again.
pub const MIGRATE_TICK_MS: u64 = 1_000;

/// How often control looks whether ranks are lost for longer than their grace.
pub const RECOVER_TICK_MS: u64 = 500;

/// How long a rank may be lost unless somebody says otherwise: a process that was restarted has begun to load by then.
pub const GRACE_SECONDS_DEFAULT: u64 = 30;

/// Longest grace.
pub const GRACE_SECONDS_MAX: u64 = 86_400;

/// How often control looks at least whether workers use the tactics that were chosen.
pub const CHOOSE_TICK_MS: u64 = 1_000;

/// Candidates, problems, measurements and choices of a worker: far more than devices have.
pub const TACTICS_MAX: usize = 4_096;

/// Shortest time between two such looks: what all ranks say at about the same time is looked at together.
pub const MIGRATE_REST_MS: u64 = 20;

/// Layers that are under way at once unless somebody says otherwise: one is copied while another waits for its call.
pub const LAYERS_AT_ONCE_DEFAULT: u32 = 2;

/// Most layers that may be: more than the deepest models have.
pub const LAYERS_AT_ONCE_MAX: u64 = 1_024;

/// Bytes that a rank copies in a second unless somebody says otherwise: some per cent of what calls read.
pub const BYTES_PER_SECOND_DEFAULT: u64 = 500_000_000;

/// How long a rank that others wait for may say nothing new: an expert takes far less than a second unless it is throttled to that.
pub const STUCK_MS: u64 = 30_000;

/// Verdicts on policies that are kept: one that fails at every question of an hour leaves room for the others.
pub const VERDICTS_MAX: i64 = 10_000;

/// Pins of a group's experts: one for every expert of a deep model's layer on some ranks.
pub const PINS_MAX: usize = 4_096;

/// Policies in the shadow of a group: as many plans come with every window.
pub const SHADOWS_MAX: usize = 8;

/// Scores of shadows that are kept: two days of windows of 10 s of a group with four.
pub const SCORES_MAX: i64 = 100_000;

/// Verdicts of a policy that are shown.
pub const VERDICTS_SHOWN: u32 = 20;

/// Committed placements of a layer among which control looks for those that ranks do not hold yet.
pub const COMMITTED_LOOKED_AT: usize = 16;
