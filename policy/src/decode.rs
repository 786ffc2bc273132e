use std::sync::Arc;

use proto::Token;

use crate::kernels::{
    KeyValues, LANES, MatrixView, Start, add, attend_row, matmul, rms_norm, rotate, swiglu, vectorized,
};
use crate::{ModelConfig, PackedWeights};

/// Tokens to append to a slot.
#[derive(Clone, Debug)]
pub struct Feed<'a> {
    /// Which sequence.
    pub slot: usize,
    /// One or more tokens.
    pub tokens: &'a [Token],
}

/// The network with a key-value cache for a fixed number of slots. Gives the same bits as [`crate::Model`].
#[derive(Clone, Debug)]
pub struct Decoder {
    weights: Arc<PackedWeights>,
    num_slots: usize,
    /// Tokens in each slot.
    lengths: Vec<usize>,
    layers: Vec<LayerCache>,
    scratch: Scratch,
}

#[derive(Clone, Debug)]
struct LayerCache {
    /// By slot and key-value head: `[head_dim, capacity]`.
    keys: Vec<f32>,
    /// By slot and key-value head: `[capacity, head_dim]`.
    values: Vec<f32>,
}

#[derive(Clone, Debug, Default)]
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    projected: Vec<f32>,
    query: Vec<f32>,
    weights: Vec<f32>,
    logits: Vec<f32>,
}

impl Decoder {
    /// Makes room for `num_slots` sequences.
    pub fn new(weights: Arc<PackedWeights>, num_slots: usize) -> Decoder {
        let config = &weights.config;
        let cache_len = num_slots * config.num_kv_heads * config.head_dim() * capacity(config);
        let cache = LayerCache { keys: vec![0.0; cache_len], values: vec![0.0; cache_len] };
        Decoder {
            num_slots,
            lengths: vec![0; num_slots],
            layers: vec![cache; config.num_layers],
            scratch: Scratch::default(),
            weights,
        }
    }

    /// Empties every slot and plays other weights.
    pub fn set_weights(&mut self, weights: Arc<PackedWeights>) {
        if weights.config == self.weights.config {
            self.weights = weights;
            self.lengths.fill(0);
        } else {
            *self = Decoder::new(weights, self.num_slots);
        }
    }

    /// Gives the shape of the network that is played.
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// Empties a slot.
    pub fn reset(&mut self, slot: usize) {
        self.lengths[slot] = 0;
    }

    /// Appends tokens to slots, each slot at most once, and gives the logits `[feeds, V]` behind the last token of each.
    ///
    /// # Panics
    /// When a slot would grow past `max_positions`, or a token is not in the vocabulary.
    pub fn forward(&mut self, feeds: &[Feed<'_>]) -> &[f32] {
        let Decoder { weights, num_slots: _, lengths, layers, scratch } = self;
        let config = &weights.config;
        let (width, qkv_dim) = (config.d_model, weights.shape.qkv_dim());
        let num_rows: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
        let s = scratch;
        s.x.clear();
        for token in feeds.iter().flat_map(|feed| feed.tokens) {
            let start = usize::from(*token) * width;
            s.x.extend_from_slice(&weights.embed[start..start + width]);
        }
        s.normed.resize(num_rows * width, 0.0);
        s.attended.resize(num_rows * width, 0.0);
        s.projected.resize(num_rows * width, 0.0);
        s.qkv.resize(num_rows * qkv_dim, 0.0);
        s.gate_up.resize(num_rows * 2 * config.ff_dim, 0.0);
        s.gated.resize(num_rows * config.ff_dim, 0.0);
        s.query.resize(config.head_dim(), 0.0);
        s.weights.resize(capacity(config), 0.0);
        for (layer, cache) in weights.layers.iter().zip(layers) {
            rms_norm(&s.x, &layer.attention_norm, &mut s.normed);
            matmul(MatrixView::row_major(&s.normed, width), num_rows, &layer.qkv.forward, Start::Zero, &mut s.qkv);
            let scratch = (&mut s.query[..], &mut s.weights[..]);
            attend(weights, cache, feeds, lengths, &s.qkv, scratch, &mut s.attended);
            matmul(
                MatrixView::row_major(&s.attended, width),
                num_rows,
                &layer.out.forward,
                Start::Zero,
                &mut s.projected,
            );
            add(&mut s.x, &s.projected);
            rms_norm(&s.x, &layer.mlp_norm, &mut s.normed);
            matmul(
                MatrixView::row_major(&s.normed, width),
                num_rows,
                &layer.gate_up.forward,
                Start::Zero,
                &mut s.gate_up,
            );
            swiglu(&s.gate_up, &mut s.gated, config.ff_dim);
            matmul(
                MatrixView::row_major(&s.gated, config.ff_dim),
                num_rows,
                &layer.down.forward,
                Start::Zero,
                &mut s.projected,
            );
            add(&mut s.x, &s.projected);
        }
        let mut last_row = 0;
        for (feed_index, feed) in feeds.iter().enumerate() {
            lengths[feed.slot] += feed.tokens.len();
            last_row += feed.tokens.len();
            s.x.copy_within((last_row - 1) * width..last_row * width, feed_index * width);
        }
        rms_norm(&s.x[..feeds.len() * width], &weights.norm, &mut s.normed[..feeds.len() * width]);
        s.logits.resize(feeds.len() * config.vocabulary_size, 0.0);
        matmul(MatrixView::row_major(&s.normed, width), feeds.len(), &weights.head.forward, Start::Zero, &mut s.logits);
        &s.logits
    }
}

fn capacity(config: &ModelConfig) -> usize {
    config.max_positions.next_multiple_of(LANES)
}

/// Appends the rows' keys and values to the cache of one layer and attends.
fn attend(
    network: &PackedWeights,
    cache: &mut LayerCache,
    feeds: &[Feed<'_>],
    lengths: &[usize],
    qkv: &[f32],
    (query, weights): (&mut [f32], &mut [f32]),
    out: &mut [f32],
) {
    let (shape, rotary, capacity) = (network.shape, &network.rotary, capacity(&network.config));
    let (head_dim, width) = (shape.head_dim, shape.num_heads * shape.head_dim);
    let per_kv_head = shape.num_heads / shape.num_kv_heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    vectorized!({
        let mut rows = qkv.chunks_exact(shape.qkv_dim()).zip(out.chunks_exact_mut(width));
        for feed in feeds {
            let first = lengths[feed.slot];
            for (position, (row, out)) in (first..first + feed.tokens.len()).zip(rows.by_ref()) {
                for kv_head in 0..shape.num_kv_heads {
                    let start = (feed.slot * shape.num_kv_heads + kv_head) * head_dim * capacity;
                    let keys = &mut cache.keys[start..start + head_dim * capacity];
                    let values = &mut cache.values[start..start + head_dim * capacity];
                    rotate(&row[shape.key_offset(kv_head)..][..head_dim], rotary.at(position), 1.0, 1.0, query);
                    for (index, value) in query.iter().enumerate() {
                        keys[index * capacity + position] = *value;
                    }
                    values[position * head_dim..(position + 1) * head_dim]
                        .copy_from_slice(&row[shape.value_offset(kv_head)..][..head_dim]);
                    let key_values = KeyValues { keys, key_stride: capacity, values, value_stride: head_dim };
                    for head in kv_head * per_kv_head..(kv_head + 1) * per_kv_head {
                        let columns = head * head_dim..(head + 1) * head_dim;
                        rotate(&row[columns.clone()], rotary.at(position), 1.0, scale, query);
                        attend_row(query, key_values, position + 1, weights, &mut out[columns]);
                    }
                }
            }
        }
    });
}
