use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use proto::TokenId;

use super::cache::{Cache, LayerCache, Place};
use super::kernels::{
    MatrixView, PackedMatrix, ROW_TILE, add, attend, for_row_tiles, set_position, swiglu, vectorized,
};
use super::network::{keep_rows, normalise};
use super::packed::PackedWeights;
use super::threads::{ThreadPool, helped_matmul};
use crate::{AttentionShape, Draw, Error, Feed, ModelConfig, Policy, Weights, sample};

/// The network with a key-value cache.
pub(crate) struct CpuPolicy {
    weights: Arc<PackedWeights>,
    pool: ThreadPool,
    num_slots: usize,
    cache: Cache,
    scratch: Scratch,
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
    pub(crate) fn new(weights: Arc<PackedWeights>, num_slots: usize, pool: ThreadPool) -> CpuPolicy {
        let cache = Cache::new(&weights.config, num_slots);
        CpuPolicy { pool, num_slots, cache, scratch: Scratch::default(), weights }
    }

    /// Appends tokens to slots, and appends the logits after each feed.
    fn feed_rows(&mut self, feeds: &[Feed<'_>], helpers: Option<&ThreadPool>) {
        let CpuPolicy { weights, cache, scratch: s, .. } = self;
        let config = &weights.config;
        let (width, epsilon) = (config.d_model, config.variant.rms_norm_eps);
        let ends = feeds.iter().scan(0, |end, feed| {
            *end += feed.tokens.len();
            Some(*end)
        });
        let last_rows: Vec<usize> = ends.map(|end| end - 1).collect();
        s.x.clear();
        weights.append_embeddings(feeds.iter().flat_map(|feed| feed.tokens), &mut s.x);
        s.weights.resize(ROW_TILE * cache.capacity(), 0.0);
        feeds.iter().for_each(|feed| cache.prepare(feed.slot));
        let last_layer = weights.layers.len() - 1;
        for (index, layer) in weights.layers.iter().enumerate() {
            normalise(&s.x, &layer.attention_norm, epsilon, &mut s.normed);
            linear(helpers, &s.normed, &layer.qkv, &mut s.qkv);
            let positions = feeds.iter().flat_map(|feed| (cache.len(feed.slot)..).take(feed.tokens.len()));
            layer.finish_qkv(epsilon, positions, &mut s.qkv, None);
            let attended_width = layer.shape.queries_dim();
            s.attended.resize(s.x.len() / width * attended_width, 0.0);
            let capacity = cache.capacity();
            let places = feeds.iter().map(|feed| {
                let first = cache.len(feed.slot);
                (cache.place(feed.slot), first..first + feed.tokens.len())
            });
            let places: Vec<(Place, Range<usize>)> = places.collect();
            attention(layer.shape, cache.layer(index), &places, &s.qkv, (&mut s.weights, capacity), &mut s.attended);
            if index == last_layer {
                keep_rows(&mut s.x, &last_rows, width);
                keep_rows(&mut s.attended, &last_rows, attended_width);
            }
            linear(helpers, &s.attended, &layer.out, &mut s.projected);
            add(&mut s.x, &s.projected);
            normalise(&s.x, &layer.mlp_norm, epsilon, &mut s.normed);
            linear(helpers, &s.normed, &layer.gate_up, &mut s.gate_up);
            s.gated.resize(s.gate_up.len() / 2, 0.0);
            swiglu(&s.gate_up, &mut s.gated, config.ff_dim);
            linear(helpers, &s.gated, &layer.down, &mut s.projected);
            add(&mut s.x, &s.projected);
        }
        for feed in feeds {
            cache.grow(feed.slot, feed.tokens.len());
        }
        normalise(&s.x, &weights.norm, epsilon, &mut s.normed);
        linear(helpers, &s.normed, &weights.head, &mut s.of_feeds);
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
            self.cache.clear();
        } else {
            *self = CpuPolicy::new(weights, self.num_slots, self.pool.clone());
        }
        Ok(())
    }

    fn reset(&mut self, slot: usize) {
        self.cache.reset(slot);
    }

    fn fork(&mut self, from: usize, to: usize, len: usize) -> Result<(), Error> {
        let held = self.cache.len(from);
        assert!(len <= held, "expected up to {held} tokens of slot {from}, got {len}");
        self.cache.fork(from, to, len);
        Ok(())
    }

    /// Computes a number of rows at a time, which bounds the memory beside the cache.
    fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error> {
        self.scratch.logits.clear();
        let (weights, pool) = (self.weights.clone(), self.pool.clone());
        pool.run(&weights.config, |helpers| {
            let mut rest = feeds;
            while !rest.is_empty() {
                let mut num_rows = 0;
                let fits = |feed: &&Feed<'_>| {
                    num_rows += feed.tokens.len();
                    num_rows <= MAX_ROWS
                };
                let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
                self.feed_rows(now, helpers);
                rest = later;
            }
        });
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

fn linear(helpers: Option<&ThreadPool>, x: &[f32], weight: &PackedMatrix, out: &mut Vec<f32>) {
    let inputs = weight.num_rows();
    let num_rows = x.len() / inputs;
    out.resize(num_rows * weight.num_columns(), 0.0);
    helped_matmul(helpers, MatrixView::row_major(x, inputs), num_rows, weight, out);
}

/// Appends the rows' keys and values to the cache of one layer and attends.
///
/// - `places`: where each feed's slot lies, and the positions of its tokens.
fn attention(
    shape: AttentionShape,
    cache: &mut LayerCache,
    places: &[(Place, Range<usize>)],
    qkv: &[f32],
    (weights, capacity): (&mut [f32], usize),
    out: &mut [f32],
) {
    let (head_dim, width) = (shape.head_dim, shape.queries_dim());
    vectorized!({
        let mut rows = qkv.chunks_exact(shape.qkv_dim()).zip(out.chunks_exact_mut(width));
        for (place, positions) in places {
            for (position, (row, out)) in positions.clone().zip(rows.by_ref()) {
                for kv_head in 0..shape.num_kv_heads {
                    let [keys, values] = place.own(cache, kv_head);
                    set_position(keys, position, &row[shape.key_offset(kv_head)..][..head_dim]);
                    values[position * head_dim..(position + 1) * head_dim]
                        .copy_from_slice(&row[shape.value_offset(kv_head)..][..head_dim]);
                    let [beginning, own] = place.key_values(cache, kv_head);
                    let parts = [(0..place.beginning(), beginning), (place.beginning()..position + 1, own)];
                    let heads = shape.heads_of(kv_head);
                    for_row_tiles!(heads.len(), |first, ROWS| {
                        let column = |query: usize| (heads.start + first + query) * head_dim;
                        let queries: [&[f32]; ROWS] = std::array::from_fn(|query| &row[column(query)..][..head_dim]);
                        let seen = std::array::from_fn(|_| shape.seen_by(position));
                        let (weights, out) = ((&mut *weights, capacity), (&mut out[column(0)..], head_dim));
                        attend(queries, seen, &parts, weights, out);
                    });
                }
            }
        }
    });
}
