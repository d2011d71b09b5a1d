//! Committed placements.

use std::collections::BTreeMap;

use protocol::message::ServedLayer;
use protocol::placement::{Placement, Split};
use protocol::session::{LayerPlacement, Register};
use serde_json::json;
use sqlx::{FromRow, SqliteConnection};

use super::audit::{self, Entry};
use super::{Store, StoreError, signed};
use crate::placing::{Misfit, PlacementFile, fits, in_order, layer_placement, rooms};
use crate::proposing::Proposal;
use crate::recovering::Repaired;
use crate::splitting::ProposedSplit;

/// What a placement comes from.
const DEFAULT: &str = "default";
const FILE: &str = "file";
const IMPORT: &str = "import";
const PROPOSAL: &str = "proposal";
const REPAIR: &str = "repair";
const ROLLBACK: &str = "rollback";

/// What a placement was made from.
#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    /// Nobody's decision.
    Default,
    /// A file, by its digest.
    File(&'a str),
    /// Another engine's placement.
    Import,
    /// A proposal, by its name.
    Proposal(&'a str),
    /// What lost ranks had was given a place elsewhere.
    Repair,
    /// An earlier epoch.
    Rollback,
}

impl<'a> Source<'a> {
    /// Its name in the store, the digest of a file, and the name of a proposal.
    fn columns(self) -> (&'static str, Option<&'a str>, Option<&'a str>) {
        match self {
            Self::Default => (DEFAULT, None, None),
            Self::File(digest) => (FILE, Some(digest), None),
            Self::Import => (IMPORT, None, None),
            Self::Proposal(id) => (PROPOSAL, None, Some(id)),
            Self::Repair => (REPAIR, None, None),
            Self::Rollback => (ROLLBACK, None, None),
        }
    }
}

/// A placement of a layer, and where it comes from.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) layer: u32,
    pub(crate) epoch: u64,
    pub(crate) placement: Placement,
    pub(crate) source: String,
    /// The proposal that it was made by.
    pub(crate) proposal: Option<String>,
    /// Milliseconds since 1970.
    pub(crate) made_ms: u64,
}

impl From<Committed> for LayerPlacement {
    fn from(committed: Committed) -> Self {
        let Committed { layer, epoch, placement, .. } = committed;
        Self { layer, epoch, placement }
    }
}

/// A layer after an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Imported {
    pub(crate) layer: u32,
    pub(crate) epoch: u64,
    /// Whether the placement is another than the newest before.
    pub(crate) changed: bool,
}

/// Why there is nothing to hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Misfit(#[from] Misfit),
}

/// Why nothing is rolled back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RollbackError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("layer {layer} has no committed epoch {epoch}")]
    NoEpoch { layer: u32, epoch: u64 },
    #[error("epoch {epoch} of layer {layer} does not fit its workers any more")]
    Misfit { layer: u32, epoch: u64 },
}

#[derive(FromRow)]
struct Row {
    layer: u32,
    epoch: i64,
    placement: String,
    source: String,
    proposal: Option<String>,
    made_ms: i64,
}

impl TryFrom<Row> for Committed {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let Row { layer, epoch, source, proposal, .. } = row;
        let placement = serde_json::from_str(&row.placement)
            .map_err(|source| StoreError::Placement { layer, epoch, source })?;
        let (epoch, made_ms) = (epoch.unsigned_abs(), row.made_ms.unsigned_abs());
        Ok(Self { layer, epoch, placement, source, proposal, made_ms })
    }
}

impl Store {
    /// What a worker's group is to hold: the newest placements, unless they do not fit it or `file` is
    /// another than the one that was committed last; then the file's, or experts in order, which are
    /// committed.
    pub(crate) async fn place(
        &self,
        of: &Register,
        file: Option<&PlacementFile>,
        now_ms: u64,
    ) -> Result<Vec<LayerPlacement>, PlaceError> {
        let mut transaction =
            self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(StoreError::from)?;
        let newest = newest(&mut transaction, &of.group, &of.model.digest).await?;
        let last_file = last_file(&mut transaction, of).await?;
        let changed = file.is_some_and(|file| Some(&file.digest) != last_file.as_ref());
        let layers = of.model.layers.iter().zip(rooms(of));
        let fitting: Option<Vec<LayerPlacement>> = layers
            .map(|(layer, room)| {
                let committed = newest.iter().find(|committed| committed.layer == layer.number)?;
                let slots = committed.placement.slots_per_rank();
                // Nobody has decided for fewer slots than there are now.
                let stays = committed.source != DEFAULT || slots == room;
                let fits = fits(of, layer, room, &committed.placement);
                (stays && fits).then(|| committed.clone().into())
            })
            .collect();
        if let Some(fitting) = fitting
            && !changed
        {
            return Ok(fitting);
        }
        let (placements, source) = match file {
            Some(file) => (file.placements(of)?, Source::File(&file.digest)),
            None => (in_order(of)?, Source::Default),
        };
        let place = |(layer, placement): (&ServedLayer, Placement)| {
            let before = newest.iter().find(|committed| committed.layer == layer.number);
            let epoch = before.map_or(0, |committed| committed.epoch) + 1;
            LayerPlacement { layer: layer.number, epoch, placement }
        };
        let placed: Vec<_> = of.model.layers.iter().zip(placements).map(place).collect();
        for layer in &placed {
            commit(&mut transaction, of, layer, (source, now_ms)).await?;
        }
        self.commit(transaction).await?;
        Ok(placed)
    }

    /// Commits placements of every layer, in the order of the model's layers; those that are the newest
    /// already keep their epoch. With `dry_run` it only says what would be.
    pub(crate) async fn import(
        &self,
        of: &Register,
        placements: Vec<Placement>,
        dry_run: bool,
        entry: Entry<'_>,
    ) -> Result<Vec<Imported>, StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let newest = newest(&mut transaction, &of.group, &of.model.digest).await?;
        let (mut imported, mut before) = (Vec::new(), Vec::new());
        for (layer, placement) in of.model.layers.iter().zip(placements) {
            let layer = layer.number;
            let known = newest.iter().find(|committed| committed.layer == layer);
            let epoch = known.map_or(0, |committed| committed.epoch);
            let changed = known.is_none_or(|committed| committed.placement != placement);
            let epoch = epoch + u64::from(changed);
            if changed {
                let placed = LayerPlacement { layer, epoch, placement };
                commit(&mut transaction, of, &placed, (Source::Import, entry.at_ms)).await?;
                before.push(known.map(|committed| (layer, committed.epoch)));
            }
            imported.push(Imported { layer, epoch, changed });
        }
        if !dry_run {
            let of_changed = imported.iter().filter(|layer| layer.changed);
            let after: Vec<_> = of_changed.map(|layer| (layer.layer, layer.epoch)).collect();
            let [before, after] = [json!({ "epochs": before }), json!({ "epochs": after })];
            audit::write(&mut transaction, entry.of(&of.group).changed(&before, &after)).await?;
            self.commit(transaction).await?;
        }
        Ok(imported)
    }

    /// Commits placements that layers had before, under new epochs; a layer whose newest placement is the same keeps it.
    pub(crate) async fn roll_back(
        &self,
        of: &Register,
        to: &[(u32, u64)],
        entry: Entry<'_>,
    ) -> Result<Vec<Imported>, RollbackError> {
        let begun = self.pool.begin_with("BEGIN IMMEDIATE").await;
        let mut transaction = begun.map_err(StoreError::from)?;
        let newest = newest(&mut transaction, &of.group, &of.model.digest).await?;
        let (mut done, mut before) = (Vec::new(), Vec::new());
        for &(layer, epoch) in to {
            let none = RollbackError::NoEpoch { layer, epoch };
            let known = newest.iter().find(|committed| committed.layer == layer);
            let (Some(known), Some(row)) =
                (known, epoch_of(&mut transaction, of, (layer, epoch)).await?)
            else {
                return Err(none);
            };
            let placement = Committed::try_from(row)?.placement;
            let mut layers = of.model.layers.iter().zip(rooms(of));
            let served = layers.find(|(served, _)| served.number == layer);
            if !served.is_some_and(|(served, room)| fits(of, served, room, &placement)) {
                return Err(RollbackError::Misfit { layer, epoch });
            }
            let changed = placement != known.placement;
            let epoch = known.epoch + u64::from(changed);
            if changed {
                let placed = LayerPlacement { layer, epoch, placement };
                commit(&mut transaction, of, &placed, (Source::Rollback, entry.at_ms)).await?;
                before.push((layer, known.epoch));
            }
            done.push(Imported { layer, epoch, changed });
        }
        let of_changed = done.iter().filter(|layer| layer.changed);
        let after: Vec<_> = of_changed.map(|layer| (layer.layer, layer.epoch)).collect();
        let [before, after] = [json!({ "epochs": before }), json!({ "epochs": after, "to": to })];
        audit::write(&mut transaction, entry.of(&of.group).changed(&before, &after)).await?;
        self.commit(transaction).await?;
        Ok(done)
    }

    /// Commits for layers what `repaired` makes of their newest placements, where it makes something; the newest epoch of every
    /// layer afterwards.
    pub(crate) async fn repair(
        &self,
        of: &Register,
        entry: Entry<'_>,
        repaired: impl Fn(u32, &Placement) -> Option<Repaired>,
    ) -> Result<BTreeMap<u32, u64>, StoreError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let newest = newest(&mut transaction, &of.group, &of.model.digest).await?;
        let mut epochs = BTreeMap::new();
        let (mut before, mut after, mut moved, mut left) = (Vec::new(), Vec::new(), 0, Vec::new());
        for Committed { layer, epoch, placement, .. } in newest {
            epochs.insert(layer, epoch);
            let Some(repaired) = repaired(layer, &placement) else { continue };
            moved += repaired.moved;
            left.extend(repaired.left.into_iter().map(|expert| (layer, expert)));
            let placed = LayerPlacement { layer, epoch: epoch + 1, placement: repaired.placement };
            commit(&mut transaction, of, &placed, (Source::Repair, entry.at_ms)).await?;
            epochs.insert(layer, placed.epoch);
            before.push((layer, epoch));
            after.push((layer, placed.epoch));
        }
        if !after.is_empty() {
            let [before, after] = [
                json!({ "epochs": before }),
                json!({ "epochs": after, "moved": moved, "left": left }),
            ];
            audit::write(&mut transaction, entry.of(&of.group).changed(&before, &after)).await?;
            self.commit(transaction).await?;
        }
        Ok(epochs)
    }

    /// The newest placement of every layer.
    pub(crate) async fn placements(
        &self,
        group: &str,
        model: &str,
    ) -> Result<Vec<Committed>, StoreError> {
        newest(&mut *self.pool.acquire().await?, group, model).await
    }

    /// Placements of a layer that are older than `before`, newest first.
    pub(crate) async fn epochs(
        &self,
        (group, model): (&str, &str),
        layer: u32,
        before: u64,
        limit: usize,
    ) -> Result<Vec<Committed>, StoreError> {
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT layer, epoch, placement, source, proposal, made_ms FROM placements
             WHERE group_name = ?1 AND model = ?2 AND layer = ?3 AND epoch < ?4
             ORDER BY epoch DESC LIMIT ?5",
        )
        .bind(group)
        .bind(model)
        .bind(layer)
        .bind(i64::try_from(before).unwrap_or(i64::MAX))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Committed::try_from).collect()
    }
}

async fn newest(
    connection: &mut SqliteConnection,
    group: &str,
    model: &str,
) -> Result<Vec<Committed>, StoreError> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT layer, max(epoch) AS epoch, placement, source, proposal, made_ms FROM placements
         WHERE group_name = ?1 AND model = ?2 GROUP BY layer ORDER BY layer",
    )
    .bind(group)
    .bind(model)
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(Committed::try_from).collect()
}

/// One committed placement.
async fn epoch_of(
    connection: &mut SqliteConnection,
    of: &Register,
    (layer, epoch): (u32, u64),
) -> Result<Option<Row>, StoreError> {
    let row = sqlx::query_as(
        "SELECT layer, epoch, placement, source, proposal, made_ms FROM placements
         WHERE group_name = ?1 AND model = ?2 AND layer = ?3 AND epoch = ?4",
    );
    let row = row.bind(&of.group).bind(&of.model.digest).bind(layer);
    Ok(row.bind(i64::try_from(epoch).unwrap_or(i64::MAX)).fetch_optional(connection).await?)
}

/// The newest committed epoch of each layer.
pub(super) async fn newest_epochs(
    connection: &mut SqliteConnection,
    group: &str,
    model: &str,
) -> Result<BTreeMap<u32, u64>, StoreError> {
    let rows: Vec<(u32, i64)> = sqlx::query_as(
        "SELECT layer, max(epoch) FROM placements WHERE group_name = ?1 AND model = ?2
         GROUP BY layer",
    )
    .bind(group)
    .bind(model)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|(layer, epoch)| (layer, epoch.unsigned_abs())).collect())
}

/// Commits what a proposal changes, each layer under the epoch after the one that it replaces.
pub(super) async fn commit_proposal(
    connection: &mut SqliteConnection,
    of: &Register,
    proposal: &Proposal,
    now_ms: u64,
) -> Result<(), PlaceError> {
    let file = format!("proposal {}", proposal.id);
    for change in &proposal.changes {
        let (layer, epoch) = (change.layer, change.epoch + 1);
        let mut placement = layer_placement(&file, of, layer, &change.phy2log)?;
        if let Some(ProposedSplit { sources, weights, .. }) = &change.split {
            let split = Split { sources: *sources, weights: weights.clone() };
            let misfit = |source| Misfit::Layer { file: file.clone(), layer, source };
            placement = placement.with_split(split).map_err(misfit)?;
        }
        let placed = LayerPlacement { layer, epoch, placement };
        commit(connection, of, &placed, (Source::Proposal(&proposal.id), now_ms)).await?;
    }
    Ok(())
}

/// Digest of the file that was committed last.
async fn last_file(
    connection: &mut SqliteConnection,
    of: &Register,
) -> Result<Option<String>, StoreError> {
    let digest = sqlx::query_scalar(
        "SELECT file_digest FROM placements
         WHERE group_name = ?1 AND model = ?2 AND file_digest IS NOT NULL
         ORDER BY epoch DESC LIMIT 1",
    );
    Ok(digest.bind(&of.group).bind(&of.model.digest).fetch_optional(connection).await?)
}

async fn commit(
    connection: &mut SqliteConnection,
    of: &Register,
    placed: &LayerPlacement,
    (source, now_ms): (Source<'_>, u64),
) -> Result<(), StoreError> {
    let LayerPlacement { layer, epoch, placement } = placed;
    let epoch = signed(*epoch)?;
    let text = serde_json::to_string(placement).map_err(|source| StoreError::Placement {
        layer: *layer,
        epoch,
        source,
    })?;
    let (source, file_digest, proposal) = source.columns();
    sqlx::query(
        "INSERT INTO placements
             (group_name, model, layer, epoch, placement, source, file_digest, proposal, made_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )
    .bind(&of.group)
    .bind(&of.model.digest)
    .bind(layer)
    .bind(epoch)
    .bind(text)
    .bind(source)
    .bind(file_digest)
    .bind(proposal)
    .bind(signed(now_ms)?)
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::fleet::tests::register;

    fn facts(placed: &[LayerPlacement]) -> Vec<(u64, u32, i64)> {
        let fact = |placed: &LayerPlacement| {
            let placement = &placed.placement;
            (placed.epoch, placement.slots_per_rank(), placement.to_phy2log()[0])
        };
        placed.iter().map(fact).collect()
    }

    #[tokio::test]
    async fn a_file_is_committed_when_it_is_new_and_what_fits_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("p.sqlite")).await.unwrap();
        let path = folder.path().join("p.json");
        let file = |row: Vec<i64>| {
            fs::write(&path, serde_json::to_vec(&[row]).unwrap()).unwrap();
            PlacementFile::read(&path).unwrap()
        };
        let (up, down) = (file((0..32).collect()), file((0..32).rev().collect()));
        let (two, wide) = (register(0, 1), Register { slots_per_rank: 18, ..register(1, 1) });
        let four = Register { ranks: 4, slots_per_rank: 8, ..register(0, 1) };
        // Room, file, and the epoch, slots and first expert that they get.
        let steps = [
            (&two, None, (1, 16, 0)),
            (&two, None, (1, 16, 0)),
            (&wide, None, (2, 18, 0)),
            (&two, None, (3, 16, 0)),
            (&two, Some(&down), (4, 16, 31)),
            (&wide, Some(&down), (4, 16, 31)),
            (&two, None, (4, 16, 31)),
            (&two, Some(&up), (5, 16, 0)),
            (&four, Some(&up), (6, 8, 0)),
            (&two, None, (7, 16, 0)),
        ];
        for (step, (of, file, expected)) in steps.into_iter().enumerate() {
            let placed = store.place(of, file, 100).await.unwrap();
            assert_eq!(facts(&placed), [expected], "step {step}");
        }
        let error = store.place(&four, Some(&file(vec![0])), 0).await.unwrap_err();
        assert!(error.to_string().ends_with("1 slots cannot be divided evenly among 4 ranks"));
        let newest = store.placements("g", "d").await.unwrap();
        assert_eq!((newest.len(), newest[0].epoch), (1, 7));
        let epochs = store.epochs(("g", "d"), 0, 5, 2).await.unwrap();
        let sources: Vec<_> = epochs.iter().map(|c| (c.epoch, c.source.as_str())).collect();
        assert_eq!(sources, [(4, "file"), (3, "default")]);
    }
}
