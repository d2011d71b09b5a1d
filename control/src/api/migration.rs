//! Migrations: what is on its way, how far it is, who is waited for; and how fast it may go.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{JsonOf, PathOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use super::placements::MovingView;
use crate::migrating::RankLayer;
use crate::motion::{Pace, Step, Stuck};
use crate::state::{Shared, State as Whole, now_ms};
use crate::store::placements::Committed;

/// What is on its way in a group.
#[derive(Serialize, ToSchema)]
pub(super) struct MigrationView {
    pace: Pace,
    /// Why nothing can be on its way now.
    problem: Option<String>,
    /// Bytes that ranks copy for layers that are under way, over all ranks.
    bytes: u64,
    /// Bytes of them that are still to be copied.
    bytes_left: u64,
    /// Layers whose ranks do not all hold what is asked for.
    layers: Vec<LayerMotionView>,
}

/// A layer on its way to what is asked for.
#[derive(Serialize, ToSchema)]
struct LayerMotionView {
    /// The model's number of the layer.
    layer: u32,
    /// The earliest epoch that a rank holds.
    from_epoch: u64,
    /// The epoch that is asked for.
    to_epoch: u64,
    /// What that comes from: `default`, `file`, `import`, `proposal`, `repair` or `rollback`.
    source: String,
    /// The proposal that it was made by.
    proposal: Option<String>,
    /// When it was committed, in milliseconds since 1970.
    made_ms: u64,
    step: Step,
    /// Since when it is at this step, in milliseconds since 1970.
    since_ms: u64,
    /// A rank that others wait for, and that has said nothing new for half a minute.
    stuck: Option<Stuck>,
    /// What ranks say of it; those that have nothing to say are left out.
    ranks: Vec<MovingView>,
}

/// How fast experts are to move.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewPace {
    pace: Pace,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// What is on its way in a group: layers whose ranks do not all hold what was committed last. A rollback without layers gives it up.
#[utoipa::path(get, path = "/api/v1/groups/{group}/migration", params(("group" = String, Path)),
    responses((status = 200, body = MigrationView), (status = 404, body = Problem)))]
pub(super) async fn migration(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
) -> Result<Json<MigrationView>, ApiError> {
    Ok(Json(view(&state, &group).await?))
}

/// Changes how fast experts of a group move, or pauses that. A layer for which a rank is ready already comes to be in force also
/// in a pause. What is not given is as if nobody had ever said anything.
#[utoipa::path(put, path = "/api/v1/groups/{group}/migration", params(("group" = String, Path)),
    request_body = NewPace, security(("token" = ["operator"])),
    responses((status = 200, body = MigrationView), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn set_pace(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewPace>,
) -> Result<Json<MigrationView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewPace { pace, reason: why } = new;
    let entry = caller.entry("migration.pace", reason(&why)?);
    pace.check()?;
    state.store.set(&group, &pace, entry).await?;
    Ok(Json(view(&state, &group).await?))
}

async fn view(state: &Whole, group: &str) -> Result<MigrationView, ApiError> {
    let model = register_of(&state.fleet(), group)?.model.digest.clone();
    let pace = state.store.setting(group).await?;
    let asked = state.store.placements(group, &model).await?;
    let now_ms = now_ms();
    let staging = state.fleet().staging(group, None, now_ms, state.patience_ms());
    let problem = staging.as_ref().err().map(ToString::to_string);
    let layers: Vec<LayerMotionView> = staging
        .into_iter()
        .flatten()
        .filter_map(|(layer, ranks)| {
            let asked = asked.iter().find(|asked| asked.layer == layer)?;
            layer_view(state, (group, asked), &ranks, &pace, now_ms)
        })
        .collect();
    let ranks = || layers.iter().flat_map(|layer| &layer.ranks);
    let bytes = ranks().map(|rank| rank.bytes).sum();
    let bytes_left = ranks().map(|rank| rank.bytes_left).sum();
    Ok(MigrationView { pace, problem, bytes, bytes_left, layers })
}

/// A layer whose ranks do not all hold what is asked for.
fn layer_view(
    state: &Whole,
    (group, asked): (&str, &Committed),
    ranks: &[RankLayer],
    pace: &Pace,
    now_ms: u64,
) -> Option<LayerMotionView> {
    let from_epoch = ranks.iter().map(|rank| rank.held).min()?;
    if from_epoch >= asked.epoch {
        return None;
    }
    let motions = state.motions();
    let motion = motions.get(group).and_then(|motions| motions.get(&asked.layer));
    let motion = motion.filter(|motion| motion.epoch == asked.epoch);
    let of_rank = |of: &RankLayer| {
        let staging = of.staging.as_ref().filter(|staging| staging.epoch > of.held)?;
        Some(MovingView::new(of.rank, staging, ranks))
    };
    Some(LayerMotionView {
        layer: asked.layer,
        from_epoch,
        to_epoch: asked.epoch,
        source: asked.source.clone(),
        proposal: asked.proposal.clone(),
        made_ms: asked.made_ms,
        step: Step::of(ranks, asked.epoch),
        since_ms: motion.map_or(now_ms, |motion| motion.since_ms),
        stuck: motion.and_then(|motion| motion.stuck(ranks, pace, now_ms)),
        ranks: ranks.iter().filter_map(of_rank).collect(),
    })
}
