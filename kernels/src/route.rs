//! Which replica of an expert serves a token: a hash and a table look-up without state, the same on
//! every device. Where rows then travel is the device's business.
//!
//! ```text
//! x = source_rank * 0x9E3779B1 ^ token * 0x85EBCA77 ^ expert * 0xC2B2AE3D    (wrapping u32)
//! h = min(fmix32(x) >> 16, 65534)                   (fmix32: the finaliser of MurmurHash3)
//! replica = the first whose cumulative split weight exceeds h
//! ```
//!
//! The last cumulative weight is 65535, which exceeds every `h`, so there is a replica wherever an expert has one.

use std::ops::Range;

/// Expert to replicas, of one layer. Made from a placement that was checked: every expert has a
/// replica, unless ranks were taken out, and its last cumulative weight is 65535.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTable {
    /// `experts + 1` positions into the two lists below.
    pub replica_start: Vec<u32>,
    /// Slot of each replica, counted over the whole group.
    pub slots: Vec<u32>,
    /// Cumulative split weight of each replica within its expert.
    pub cumulative: Vec<u16>,
}

impl RouteTable {
    /// Every expert once, in the slot of its own number: a rank that is alone.
    #[must_use]
    pub fn identity(experts: u32) -> Self {
        let cumulative = vec![u16::MAX; experts as usize];
        Self { replica_start: (0..=experts).collect(), slots: (0..experts).collect(), cumulative }
    }

    /// The slot, over the whole group, that serves `token` of rank `source` at `expert`; none if the expert has no replica.
    ///
    /// # Panics
    /// When the layer has no such expert.
    #[must_use]
    pub fn slot(&self, source: u32, token: u32, expert: u32) -> Option<u32> {
        let replicas = self.replicas(expert as usize);
        let slots = &self.slots[replicas.clone()];
        if slots.len() < 2 {
            return slots.first().copied();
        }
        let hash = replica_hash(source, token, expert);
        let at = self.cumulative[replicas].partition_point(|&weight| weight <= hash);
        slots.get(at).copied()
    }

    /// The same without the slots that are `gone`: replicas that stay share an expert's tokens as they shared them among
    /// themselves, or evenly if they had none. An expert of which none stays has none.
    #[must_use]
    pub fn without(&self, gone: impl Fn(u32) -> bool) -> Self {
        let experts = self.replica_start.len().saturating_sub(1);
        let mut left = Self { replica_start: vec![0], slots: Vec::new(), cumulative: Vec::new() };
        for expert in 0..experts {
            let replicas = self.replicas(expert);
            let mut before = 0;
            let mut stay: Vec<(u32, u32)> = Vec::with_capacity(replicas.len());
            for (&slot, &cumulative) in
                self.slots[replicas.clone()].iter().zip(&self.cumulative[replicas])
            {
                let weight = u32::from(cumulative - before);
                before = cumulative;
                if !gone(slot) {
                    stay.push((slot, weight));
                }
            }
            if stay.iter().all(|(_, weight)| *weight == 0) {
                stay.iter_mut().for_each(|(_, weight)| *weight = 1);
            }
            let (whole, mut sum): (u32, u32) = (stay.iter().map(|(_, weight)| weight).sum(), 0);
            for (slot, weight) in stay {
                sum += weight;
                left.slots.push(slot);
                left.cumulative.push((sum * u32::from(u16::MAX) / whole) as u16);
            }
            left.replica_start.push(left.slots.len() as u32);
        }
        left
    }

    fn replicas(&self, expert: usize) -> Range<usize> {
        self.replica_start[expert] as usize..self.replica_start[expert + 1] as usize
    }
}

/// The hash that picks a replica, 0 to 65534.
#[must_use]
pub fn replica_hash(source: u32, token: u32, expert: u32) -> u16 {
    let mixed = source.wrapping_mul(0x9E37_79B1)
        ^ token.wrapping_mul(0x85EB_CA77)
        ^ expert.wrapping_mul(0xC2B2_AE3D);
    ((fmix32(mixed) >> 16) as u16).min(u16::MAX - 1)
}

const fn fmix32(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x85EB_CA6B);
    x ^= x >> 13;
    x = x.wrapping_mul(0xC2B2_AE35);
    x ^ x >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_share_tokens_by_their_weights() {
        let table = RouteTable {
            replica_start: vec![0, 3, 4],
            slots: vec![1, 4, 9, 2],
            // A half, nothing, and the other half.
            cumulative: vec![32_767, 32_767, 65_535, 65_535],
        };
        let mut counts = [0; 10];
        for token in 0..10_000 {
            counts[table.slot(token % 4, token, 0).unwrap() as usize] += 1;
            assert_eq!(table.slot(3, token, 1), Some(2));
        }
        assert!((4_700..5_300).contains(&counts[1]), "{counts:?}");
        assert_eq!((counts[4], counts[1] + counts[9]), (0, 10_000));
    }

    #[test]
    fn replicas_that_stay_share_what_there_is() {
        let table = RouteTable {
            replica_start: vec![0, 3, 4, 6],
            slots: vec![1, 4, 9, 2, 3, 8],
            // A fifth, a fifth, and three fifths; the second expert once; all and nothing.
            cumulative: vec![13_107, 26_214, 65_535, 65_535, 65_535, 65_535],
        };
        assert_eq!(table.without(|_| false), table);
        let left = table.without(|slot| slot < 4);
        assert_eq!((&left.replica_start[..], &left.slots[..]), (&[0, 2, 2, 3][..], &[4, 9, 8][..]));
        // One to three, nobody, and all for the one that had nothing.
        assert_eq!(left.cumulative, [16_383, 65_535, 65_535]);
        for token in 0..1_000 {
            assert!(matches!(left.slot(0, token, 0), Some(4 | 9)));
            assert_eq!((left.slot(0, token, 1), left.slot(0, token, 2)), (None, Some(8)));
        }
    }

    #[test]
    fn the_hash_is_what_the_page_says() {
        assert_eq!(replica_hash(0, 0, 0), 0);
        assert_eq!(fmix32(1), 0x514e_28b7);
        assert_eq!(replica_hash(1, 0, 0), (fmix32(0x9E37_79B1) >> 16) as u16);
    }
}
