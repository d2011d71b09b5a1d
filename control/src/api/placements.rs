//! Placements: what is in force, what is asked for, and what was.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use protocol::message::ServedLayer;
use protocol::placement::{Placement, Split};
use protocol::session::{LayerPlacement, LayerStaging};
use serde::Serialize;
use utoipa::ToSchema;

use super::ask::{Part, PathOf, QueryOf, register_of};
use super::error::{ApiError, Problem};
use super::tag::tagged;
use super::views::Page;
use crate::fleet::Worker;
use crate::migrating::{RankLayer, disagreement};
use crate::state::{Shared, now_ms};
use crate::store::placements::Committed;

/// A layer, and what its group holds of it.
#[derive(Serialize, ToSchema)]
pub(super) struct PlacementView {
    /// The model's number of the layer.
    layer: u32,
    /// Experts.
    experts: u32,
    /// What every rank says that it holds; null while one is missing or loading, or holds another.
    in_force: Option<PlacedView>,
    /// The newest that is committed; null if none is.
    asked: Option<CommittedView>,
    /// Ranks that do not hold what is asked for, or are not there.
    waiting: Vec<u32>,
    /// What is on its way on ranks.
    moving: Vec<MovingView>,
}

/// Another placement that is on its way on a rank.
#[derive(Serialize, ToSchema)]
pub(super) struct MovingView {
    /// The rank.
    rank: u32,
    /// The epoch that it is to have.
    epoch: u64,
    /// Experts that it lacks still.
    left: u64,
    /// Bytes of all that it lacked when it began, as it holds experts.
    pub(super) bytes: u64,
    /// Bytes of them that it lacks still.
    pub(super) bytes_left: u64,
    /// Whether all of it is there.
    staged: bool,
    /// Whether it is to be in force once all ranks know so: nothing holds it up any more but that nobody calls.
    ready: bool,
    /// Why it does not come to be.
    problem: Option<String>,
}

impl MovingView {
    /// `all` ranks may not have the same of an expert.
    pub(super) fn new(rank: u32, staging: &LayerStaging, all: &[RankLayer]) -> Self {
        let LayerStaging { epoch, left, bytes, bytes_left, staged, ready, .. } = *staging;
        let differs = disagreement(all, epoch).filter(|differs| differs.second() == rank);
        let problem = staging.problem.clone().or(differs.map(|differs| differs.to_string()));
        Self { rank, epoch, left, bytes, bytes_left, staged, ready, problem }
    }
}

/// A placement under its number.
#[derive(Serialize, ToSchema)]
pub(super) struct PlacedView {
    /// Its number; 0 for one of the workers' own.
    epoch: u64,
    /// Slots of a rank.
    slots_per_rank: u32,
    /// The expert of every slot, rank by rank; -1 is an empty slot.
    phy2log: Vec<i64>,
    /// How tokens are split over replicas; null for evenly.
    split: Option<SplitView>,
}

/// How tokens are split over replicas.
#[derive(Serialize, ToSchema)]
struct SplitView {
    /// Rows of `weights`: 1, or one for each rank that tokens come from.
    sources: u32,
    /// Weight of each replica beside the sum over its expert's, row by row; replicas in the order of experts, then of slots.
    weights: Vec<u16>,
}

impl PlacedView {
    fn new(epoch: u64, placement: &Placement) -> Self {
        let (slots_per_rank, phy2log) = (placement.slots_per_rank(), placement.to_phy2log());
        let split = placement.split().map(|split| {
            let Split { sources, weights } = split.clone();
            SplitView { sources, weights }
        });
        Self { epoch, slots_per_rank, phy2log, split }
    }
}

/// A committed placement.
#[derive(Serialize, ToSchema)]
pub(super) struct CommittedView {
    #[serde(flatten)]
    placed: PlacedView,
    /// What it comes from: `default` (experts in order), `file`, `import`, `proposal`, `repair` (of what lost ranks had) or `rollback`.
    source: String,
    /// The proposal that it was made by.
    proposal: Option<String>,
    /// When it was committed, in milliseconds since 1970.
    made_ms: u64,
}

impl From<&Committed> for CommittedView {
    fn from(committed: &Committed) -> Self {
        let Committed { epoch, placement, source, proposal, made_ms, .. } = committed;
        let placed = PlacedView::new(*epoch, placement);
        let (source, proposal) = (source.clone(), proposal.clone());
        Self { placed, source, proposal, made_ms: *made_ms }
    }
}

/// The placement of every layer of a group, with an entity tag.
#[utoipa::path(get, path = "/api/v1/groups/{group}/placements", params(("group" = String, Path)),
    responses((status = 200, body = Vec<PlacementView>), (status = 304),
        (status = 404, body = Problem)))]
pub(super) async fn placements(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    tagged(&headers, &views(&state, &group, None).await?)
}

/// The placement of one layer of a group, with an entity tag.
#[utoipa::path(get, path = "/api/v1/groups/{group}/placements/{layer}",
    params(("group" = String, Path), ("layer" = u32, Path)),
    responses((status = 200, body = PlacementView), (status = 304),
        (status = 404, body = Problem)))]
pub(super) async fn placement(
    State(state): State<Shared>,
    PathOf((group, layer)): PathOf<(String, u32)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let view = views(&state, &group, Some(layer)).await?.pop();
    let view = view.ok_or_else(|| no_layer(&group, layer))?;
    tagged(&headers, &view)
}

/// The committed placements of a layer, newest first. They never change.
#[utoipa::path(get, path = "/api/v1/groups/{group}/placements/{layer}/epochs",
    params(("group" = String, Path), ("layer" = u32, Path), Part),
    responses((status = 200, body = Page<CommittedView>), (status = 400, body = Problem),
        (status = 404, body = Problem)))]
pub(super) async fn epochs(
    State(state): State<Shared>,
    PathOf((group, layer)): PathOf<(String, u32)>,
    QueryOf(part): QueryOf<Part>,
) -> Result<Json<Page<CommittedView>>, ApiError> {
    let register = register_of(&state.fleet(), &group)?.clone();
    if !register.model.layers.iter().any(|known| known.number == layer) {
        return Err(no_layer(&group, layer));
    }
    let limit = part.limit()?;
    let before = part.cursor()?.unwrap_or(u64::MAX);
    let of = (&group[..], &register.model.digest[..]);
    let found = state.store.epochs(of, layer, before, limit + 1).await?;
    let cursor = |committed: &Committed| committed.epoch.to_string();
    Ok(Json(Page::of(found, limit, cursor, |committed| CommittedView::from(&committed))))
}

async fn views(
    state: &Shared,
    group: &str,
    only: Option<u32>,
) -> Result<Vec<PlacementView>, ApiError> {
    let register = register_of(&state.fleet(), group)?.clone();
    let asked = state.store.placements(group, &register.model.digest).await?;
    let asked: BTreeMap<u32, Committed> =
        asked.into_iter().map(|committed| (committed.layer, committed)).collect();
    let fleet = state.fleet();
    let (now_ms, patience_ms) = (now_ms(), state.patience_ms());
    let in_force = fleet.in_force(group, now_ms, patience_ms);
    let staged = fleet.staging(group, only, now_ms, patience_ms);
    let wanted = register.model.layers.iter().enumerate();
    let wanted = wanted.filter(|(_, layer)| only.is_none_or(|only| layer.number == only));
    let view = |(at, layer): (usize, &ServedLayer)| {
        let asked = asked.get(&layer.number);
        let held = in_force.and_then(|all| all.get(at));
        let holds_asked = |held: &LayerPlacement| {
            asked.is_none_or(|asked| {
                (held.epoch, &held.placement) == (asked.epoch, &asked.placement)
            })
        };
        let waits = |rank: &u32| {
            let worker = fleet.groups.get(group).and_then(|ranks| ranks.get(rank));
            let held = worker.and_then(|worker| worker.held(now_ms, patience_ms)?.get(at));
            !held.is_some_and(holds_asked)
        };
        let ranks = fleet.groups.get(group).into_iter().flatten();
        let moving = |(rank, worker): (&u32, &Worker)| {
            let held = worker.held(now_ms, patience_ms).and_then(|held| Some(held.get(at)?.epoch));
            let staging = worker.staging().iter().find(|staging| staging.layer == layer.number);
            // What is in force is told before that it is not on its way any more.
            let staging = staging.filter(|staging| held.is_none_or(|held| held < staging.epoch));
            let all = staged.iter().flatten().find(|(of, _)| *of == layer.number);
            let all = all.map_or(&[][..], |(_, ranks)| ranks);
            staging.map(|staging| MovingView::new(*rank, staging, all))
        };
        PlacementView {
            layer: layer.number,
            experts: layer.experts,
            in_force: held.map(|held| PlacedView::new(held.epoch, &held.placement)),
            asked: asked.map(CommittedView::from),
            waiting: (0..register.ranks).filter(waits).collect(),
            moving: ranks.filter_map(moving).collect(),
        }
    };
    Ok(wanted.map(view).collect())
}

fn no_layer(group: &str, layer: u32) -> ApiError {
    ApiError::NotFound { what: "served layer", name: format!("{group}/{layer}") }
}
