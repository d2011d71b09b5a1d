//! Which replica of an expert serves a token: a hash and a table look-up without state, the same on
//! every device. Where rows then travel is the device's business.
//!
//! ```text
//! x = source_rank * 0x9E3779B1 ^ token * 0x85EBCA77 ^ expert * 0xC2B2AE3D    (wrapping u32)
//! h = min(fmix32(x) >> 16, 65534)                   (fmix32: the finaliser of MurmurHash3)
//! replica = the first whose cumulative split weight exceeds h
//! ```
//!
//! The last cumulative weight is 65535, which exceeds every `h`, so there always is a replica.

/// Expert to replicas, of one layer. Made from a placement that was checked: every expert has a
/// replica, and its last cumulative weight is 65535.
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

    /// The slot, over the whole group, that serves `token` of rank `source` at `expert`.
    ///
    /// # Panics
    /// When the layer has no such expert.
    #[must_use]
    pub fn slot(&self, source: u32, token: u32, expert: u32) -> u32 {
        let start = self.replica_start[expert as usize] as usize;
        let end = self.replica_start[expert as usize + 1] as usize;
        if end - start == 1 {
            return self.slots[start];
        }
        let hash = replica_hash(source, token, expert);
        self.slots[start + self.cumulative[start..end].partition_point(|&weight| weight <= hash)]
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
            counts[table.slot(token % 4, token, 0) as usize] += 1;
            assert_eq!(table.slot(3, token, 1), 2);
        }
        assert!((4_700..5_300).contains(&counts[1]), "{counts:?}");
        assert_eq!((counts[4], counts[1] + counts[9]), (0, 10_000));
    }

    #[test]
    fn the_hash_is_what_the_page_says() {
        assert_eq!(replica_hash(0, 0, 0), 0);
        assert_eq!(fmix32(1), 0x514e_28b7);
        assert_eq!(replica_hash(1, 0, 0), (fmix32(0x9E37_79B1) >> 16) as u16);
    }
}
