use std::ops::Range;

use super::kernels::{KeyValues, LANES};
use crate::ModelConfig;

/// Keys and values of some slots. Slots that begin alike share the positions that they begin with: they lie in the memory of one of
/// them, and come from a cache of the processor for all others.
pub(super) struct Cache {
    num_kv_heads: usize,
    head_dim: usize,
    /// Positions of a slot.
    capacity: usize,
    /// Number of tokens in each slot.
    lengths: Vec<usize>,
    /// Where each slot begins, if it is in another. That slot does not itself begin in another.
    beginnings: Vec<Option<Beginning>>,
    layers: Vec<LayerCache>,
}

#[derive(Clone, Copy, Debug)]
struct Beginning {
    slot: usize,
    /// Positions, a multiple of 16.
    len: usize,
}

pub(super) struct LayerCache {
    /// By slot and key-value head: blocks `[head_dim, 16]`, `capacity` positions in all.
    keys: Vec<f32>,
    /// By slot and key-value head: `[capacity, head_dim]`.
    values: Vec<f32>,
}

/// Where the keys and values of a slot lie in a layer.
#[derive(Clone, Copy)]
pub(super) struct Place {
    num_kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    slot: usize,
    beginning: Option<Beginning>,
}

impl Cache {
    pub(super) fn new(config: &ModelConfig, num_slots: usize) -> Cache {
        let (num_kv_heads, head_dim) = (config.num_kv_heads, config.head_dim());
        let capacity = config.max_positions.next_multiple_of(LANES);
        let len = num_slots * num_kv_heads * head_dim * capacity;
        // Not cloned: memory that is only zeroed is not taken until it is used.
        let layer = |_| LayerCache { keys: vec![0.0; len], values: vec![0.0; len] };
        Cache {
            num_kv_heads,
            head_dim,
            capacity,
            lengths: vec![0; num_slots],
            beginnings: vec![None; num_slots],
            layers: (0..config.num_layers).map(layer).collect(),
        }
    }

    /// Returns the most positions of a slot, rounded up to a multiple of 16.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the number of tokens in a slot.
    pub(super) fn len(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Empties a slot.
    pub(super) fn reset(&mut self, slot: usize) {
        (self.lengths[slot], self.beginnings[slot]) = (0, None);
    }

    /// Empties all slots.
    pub(super) fn clear(&mut self) {
        (0..self.lengths.len()).for_each(|slot| self.reset(slot));
    }

    /// Replaces the contents of the slot `to` by the first `len` tokens of the slot `from`.
    pub(super) fn fork(&mut self, from: usize, to: usize, len: usize) {
        let whole_blocks = len / LANES * LANES;
        if from != to {
            // From here on no slot begins in `to`.
            self.release(to, 0);
        } else if self.beginnings[from].is_none_or(|beginning| beginning.len <= len) {
            self.lengths[to] = len;
            return;
        }
        let (slot, in_beginning) = match self.beginnings[from] {
            Some(beginning) if len <= beginning.len => (beginning.slot, whole_blocks),
            Some(beginning) => (from, beginning.len),
            None => (from, whole_blocks),
        };
        // The last positions are followed by others in either slot.
        self.copy(slot, to, in_beginning..len);
        let origin = self.beginnings[from].map_or(from, |beginning| beginning.slot);
        self.beginnings[to] = (in_beginning > 0).then_some(Beginning { slot: origin, len: in_beginning });
        self.lengths[to] = len;
    }

    /// Makes room for tokens that are appended to a slot.
    pub(super) fn prepare(&mut self, slot: usize) {
        self.release(slot, self.lengths[slot]);
    }

    /// Counts tokens that were written to a slot.
    pub(super) fn grow(&mut self, slot: usize, num_tokens: usize) {
        self.lengths[slot] += num_tokens;
    }

    /// Returns where a slot lies.
    pub(super) fn place(&self, slot: usize) -> Place {
        let Cache { num_kv_heads, head_dim, capacity, .. } = *self;
        Place { num_kv_heads, head_dim, capacity, slot, beginning: self.beginnings[slot] }
    }

    pub(super) fn layer(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    /// Prepares for positions of a slot from one on to be overwritten: if others begin in them, one of these gets a copy, in which the
    /// rest then begin.
    fn release(&mut self, slot: usize, position: usize) {
        let begins_in = |beginning: &Option<Beginning>| {
            beginning.filter(|beginning| beginning.slot == slot && beginning.len > position).map(|it| it.len)
        };
        let others = self.beginnings.iter().enumerate().filter_map(|(other, at)| Some((begins_in(at)?, other)));
        let Some((len, heir)) = others.max() else { return };
        self.copy(slot, heir, 0..len);
        self.beginnings[heir] = None;
        for beginning in &mut self.beginnings {
            if let Some(len) = begins_in(beginning) {
                *beginning = Some(Beginning { slot: heir, len });
            }
        }
    }

    /// Copies positions, of which the first begins a block.
    fn copy(&mut self, from: usize, to: usize, positions: Range<usize>) {
        let head_len = self.head_dim * self.capacity;
        let copied = self.head_dim * positions.start..self.head_dim * positions.end.next_multiple_of(LANES);
        for cache in self.layers.iter_mut().flat_map(|LayerCache { keys, values }| [keys, values]) {
            for kv_head in 0..self.num_kv_heads {
                let [from, to] = [from, to].map(|slot| (slot * self.num_kv_heads + kv_head) * head_len);
                cache.copy_within(from + copied.start..from + copied.end, to + copied.start);
            }
        }
    }
}

impl Place {
    /// Returns the number of positions that lie in another slot.
    #[inline(always)]
    pub(super) fn beginning(&self) -> usize {
        self.beginning.map_or(0, |beginning| beginning.len)
    }

    /// Returns the keys and values of a head: those of the slot where the beginning lies, and the slot's own.
    #[inline(always)]
    pub(super) fn key_values<'a>(&self, layer: &'a LayerCache, kv_head: usize) -> [KeyValues<'a>; 2] {
        let slots = [self.beginning.map_or(self.slot, |beginning| beginning.slot), self.slot];
        slots.map(|slot| {
            let range = self.range(slot, kv_head);
            KeyValues { keys: &layer.keys[range.clone()], values: &layer.values[range], value_stride: self.head_dim }
        })
    }

    /// Returns the memory of a head's keys and values.
    #[inline(always)]
    pub(super) fn own<'a>(&self, layer: &'a mut LayerCache, kv_head: usize) -> [&'a mut [f32]; 2] {
        let range = self.range(self.slot, kv_head);
        [&mut layer.keys[range.clone()], &mut layer.values[range]]
    }

    #[inline(always)]
    fn range(&self, slot: usize, kv_head: usize) -> Range<usize> {
        let len = self.head_dim * self.capacity;
        let start = (slot * self.num_kv_heads + kv_head) * len;
        start..start + len
    }
}
