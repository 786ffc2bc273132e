use std::borrow::Cow;
use std::sync::Arc;

use proto::TokenId;

use super::kernels::{KeyValues, LANES, ROW_TILE, add, attend, for_row_tiles, set_position, swiglu, vectorized};
use super::network::{keep_rows, linear, normalise};
use super::packed::PackedWeights;
use crate::{AttentionShape, Draw, Error, Feed, ModelConfig, Policy, Weights, sample};

/// The network with a key-value cache.
pub(crate) struct CpuPolicy {
    weights: Arc<PackedWeights>,
    num_slots: usize,
    /// Number of tokens in each slot.
    lengths: Vec<usize>,
    layers: Vec<LayerCache>,
    scratch: Scratch,
}

struct LayerCache {
    /// By slot and key-value head: blocks `[head_dim, 16]`, `capacity` positions in all.
    keys: Vec<f32>,
    /// By slot and key-value head: `[capacity, head_dim]`.
    values: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    projected: Vec<f32>,
    weights: Vec<f32>,
    /// Logits of the feeds that were computed together.
    of_feeds: Vec<f32>,
    logits: Vec<f32>,
}

/// Rows that are computed together.
const MAX_ROWS: usize = 2_048;

impl CpuPolicy {
    pub(crate) fn new(weights: Arc<PackedWeights>, num_slots: usize) -> CpuPolicy {
        let config = &weights.config;
        let cache_len = num_slots * slot_len(config);
        // Not cloned: memory that is only zeroed is not taken until it is used.
        let cache = |_| LayerCache { keys: vec![0.0; cache_len], values: vec![0.0; cache_len] };
        CpuPolicy {
            num_slots,
            lengths: vec![0; num_slots],
            layers: (0..config.num_layers).map(cache).collect(),
            scratch: Scratch::default(),
            weights,
        }
    }

    /// Appends tokens to slots, and appends the logits after each feed.
    fn feed_rows(&mut self, feeds: &[Feed<'_>]) {
        let CpuPolicy { weights, num_slots: _, lengths, layers, scratch: s } = self;
        let config = &weights.config;
        let (width, epsilon) = (config.d_model, config.variant.rms_norm_eps);
        let ends = feeds.iter().scan(0, |end, feed| {
            *end += feed.tokens.len();
            Some(*end)
        });
        let last_rows: Vec<usize> = ends.map(|end| end - 1).collect();
        s.x.clear();
        weights.append_embeddings(feeds.iter().flat_map(|feed| feed.tokens), &mut s.x);
        s.weights.resize(ROW_TILE * capacity(config), 0.0);
        let last_layer = layers.len() - 1;
        for (index, (layer, cache)) in weights.layers.iter().zip(layers).enumerate() {
            normalise(&s.x, &layer.attention_norm, epsilon, &mut s.normed);
            linear(&s.normed, &layer.qkv, &mut s.qkv);
            let positions = feeds.iter().flat_map(|feed| (lengths[feed.slot]..).take(feed.tokens.len()));
            layer.finish_qkv(epsilon, positions, &mut s.qkv, None);
            let attended_width = layer.shape.queries_dim();
            s.attended.resize(s.x.len() / width * attended_width, 0.0);
            let weights = (&mut s.weights[..], capacity(config));
            attention(layer.shape, cache, feeds, lengths, &s.qkv, weights, &mut s.attended);
            if index == last_layer {
                keep_rows(&mut s.x, &last_rows, width);
                keep_rows(&mut s.attended, &last_rows, attended_width);
            }
            linear(&s.attended, &layer.out, &mut s.projected);
            add(&mut s.x, &s.projected);
            normalise(&s.x, &layer.mlp_norm, epsilon, &mut s.normed);
            linear(&s.normed, &layer.gate_up, &mut s.gate_up);
            s.gated.resize(s.gate_up.len() / 2, 0.0);
            swiglu(&s.gate_up, &mut s.gated, config.ff_dim);
            linear(&s.gated, &layer.down, &mut s.projected);
            add(&mut s.x, &s.projected);
        }
        for feed in feeds {
            lengths[feed.slot] += feed.tokens.len();
        }
        normalise(&s.x, &weights.norm, epsilon, &mut s.normed);
        linear(&s.normed, &weights.head, &mut s.of_feeds);
        s.logits.extend_from_slice(&s.of_feeds);
    }
}

impl Policy for CpuPolicy {
    fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), Error> {
        let weights = weights.on_cpu().expect("weights of this backend").clone();
        if weights.config == self.weights.config {
            self.weights = weights;
            self.lengths.fill(0);
        } else {
            *self = CpuPolicy::new(weights, self.num_slots);
        }
        Ok(())
    }

    fn reset(&mut self, slot: usize) {
        self.lengths[slot] = 0;
    }

    fn fork(&mut self, from: usize, to: usize, len: usize) -> Result<(), Error> {
        assert!(len <= self.lengths[from], "expected up to {} tokens of slot {from}, got {len}", self.lengths[from]);
        self.lengths[to] = len;
        if from == to {
            return Ok(());
        }
        let config = &self.weights.config;
        let head_len = config.head_dim() * capacity(config);
        let filled = config.head_dim() * len.next_multiple_of(LANES);
        for cache in self.layers.iter_mut().flat_map(|LayerCache { keys, values }| [keys, values]) {
            for kv_head in 0..config.num_kv_heads {
                let [from, to] = [from, to].map(|slot| (slot * config.num_kv_heads + kv_head) * head_len);
                cache.copy_within(from..from + filled, to);
            }
        }
        Ok(())
    }

    /// Computes a number of rows at a time, which bounds the memory beside the cache.
    fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error> {
        self.scratch.logits.clear();
        let mut rest = feeds;
        while !rest.is_empty() {
            let mut num_rows = 0;
            let fits = |feed: &&Feed<'_>| {
                num_rows += feed.tokens.len();
                num_rows <= MAX_ROWS
            };
            let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.feed_rows(now);
            rest = later;
        }
        Ok(())
    }

    fn logits(&self) -> Result<Cow<'_, [f32]>, Error> {
        Ok(Cow::Borrowed(&self.scratch.logits))
    }

    fn sample(&self, draws: &mut [Draw<'_>]) -> Result<Vec<(TokenId, f32)>, Error> {
        let vocabulary_size = self.weights.config.vocabulary_size;
        let draw = |Draw { feed, legal, temperature, rng }: &mut Draw<'_>| {
            sample(&self.scratch.logits[*feed * vocabulary_size..][..vocabulary_size], legal, *temperature, rng)
        };
        Ok(draws.iter_mut().map(draw).collect())
    }
}

/// Returns the number of elements of one slot in a layer's keys, and in its values.
fn slot_len(config: &ModelConfig) -> usize {
    config.num_kv_heads * config.head_dim() * capacity(config)
}

fn capacity(config: &ModelConfig) -> usize {
    config.max_positions.next_multiple_of(LANES)
}

/// Appends the rows' keys and values to the cache of one layer and attends.
fn attention(
    shape: AttentionShape,
    cache: &mut LayerCache,
    feeds: &[Feed<'_>],
    lengths: &[usize],
    qkv: &[f32],
    (weights, capacity): (&mut [f32], usize),
    out: &mut [f32],
) {
    let (head_dim, width) = (shape.head_dim, shape.queries_dim());
    vectorized!({
        let mut rows = qkv.chunks_exact(shape.qkv_dim()).zip(out.chunks_exact_mut(width));
        for feed in feeds {
            let first = lengths[feed.slot];
            for (position, (row, out)) in (first..first + feed.tokens.len()).zip(rows.by_ref()) {
                for kv_head in 0..shape.num_kv_heads {
                    let start = (feed.slot * shape.num_kv_heads + kv_head) * head_dim * capacity;
                    let keys = &mut cache.keys[start..start + head_dim * capacity];
                    let values = &mut cache.values[start..start + head_dim * capacity];
                    set_position(keys, position, &row[shape.key_offset(kv_head)..][..head_dim]);
                    values[position * head_dim..(position + 1) * head_dim]
                        .copy_from_slice(&row[shape.value_offset(kv_head)..][..head_dim]);
                    let key_values = KeyValues { keys, values, value_stride: head_dim };
                    let heads = shape.heads_of(kv_head);
                    for_row_tiles!(heads.len(), |first, ROWS| {
                        let column = |query: usize| (heads.start + first + query) * head_dim;
                        let queries: [&[f32]; ROWS] = std::array::from_fn(|query| &row[column(query)..][..head_dim]);
                        attend(
                            queries,
                            std::array::from_fn(|_| shape.seen_by(position)),
                            key_values,
                            (&mut *weights, capacity),
                            (&mut out[column(0)..], head_dim),
                        );
                    });
                }
            }
        }
    });
}
