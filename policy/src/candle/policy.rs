use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use proto::TokenId;

use super::network::{self, CandleWeights, Projected, attention, hide_future};
use super::sampler;
use crate::{Draw, Error, Feed, ModelConfig, Policy, Weights};

/// Plays all slots in one pass, with a key-value cache that is there from the start.
pub(crate) struct CandlePolicy {
    weights: Arc<CandleWeights>,
    /// Tokens in each slot.
    lengths: Vec<usize>,
    layers: Vec<LayerCache>,
    /// `[feeds, V]`
    logits: Option<Tensor>,
}

/// Keys and values of one block, `[slots, kv_heads, max_positions, head_dim]` each.
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl CandlePolicy {
    pub(crate) fn new(weights: Arc<CandleWeights>, num_slots: usize) -> Result<CandlePolicy> {
        let ModelConfig { num_kv_heads, max_positions, .. } = weights.config;
        let shape = (num_slots, num_kv_heads, max_positions, weights.config.head_dim());
        let device = weights.tensors[0].device();
        let zeros = || Tensor::zeros(shape, DType::F32, device);
        let layer = |_| Ok(LayerCache { keys: zeros()?, values: zeros()? });
        let layers = (0..weights.config.num_layers).map(layer).collect::<Result<_>>()?;
        Ok(CandlePolicy { lengths: vec![0; num_slots], layers, logits: None, weights })
    }

    fn logits_on_device(&self) -> &Tensor {
        self.logits.as_ref().expect("logits of tokens that were fed")
    }
}

impl Policy for CandlePolicy {
    fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    fn set_weights(&mut self, weights: &Weights) -> std::result::Result<(), Error> {
        let weights = weights.in_candle().expect("weights of this backend").clone();
        if weights.config == self.weights.config {
            self.weights = weights;
            self.lengths.fill(0);
        } else {
            *self = CandlePolicy::new(weights, self.lengths.len())?;
        }
        Ok(())
    }

    fn reset(&mut self, slot: usize) {
        self.lengths[slot] = 0;
    }

    fn fork(&mut self, from: usize, to: usize) -> std::result::Result<(), Error> {
        for LayerCache { keys, values } in &self.layers {
            for cache in [keys, values] {
                cache.slice_set(&cache.narrow(0, from, 1)?.copy()?, 0, to)?;
            }
        }
        self.lengths[to] = self.lengths[from];
        Ok(())
    }

    fn feed(&mut self, feeds: &[Feed<'_>]) -> std::result::Result<(), Error> {
        let CandlePolicy { weights, lengths, layers, .. } = self;
        let pass = Pass::new(&weights.config, lengths, feeds, weights.tensors[0].device())?;
        let logits = network::logits(
            &weights.config,
            &weights.tensors,
            &weights.rotary,
            (&pass.tokens, &pass.positions),
            &pass.last_rows,
            |layer, projected| pass.attend(&layers[layer], &projected),
        )?;
        for feed in feeds {
            lengths[feed.slot] += feed.tokens.len();
        }
        self.logits = Some(logits);
        Ok(())
    }

    fn logits(&self) -> std::result::Result<Cow<'_, [f32]>, Error> {
        Ok(Cow::Owned(self.logits_on_device().flatten_all()?.to_vec1()?))
    }

    fn sample(&self, draws: &mut [Draw<'_>]) -> std::result::Result<Vec<(TokenId, f32)>, Error> {
        Ok(sampler::sample(self.logits_on_device(), draws)?)
    }
}

/// Where the rows of one pass belong. Rows are packed but for attention, which takes the slots up to the last that is fed, each with
/// as many rows as the longest feed has: what is padding is computed and left alone.
struct Pass {
    tokens: Vec<TokenId>,
    /// Of each row in its slot.
    positions: Vec<u32>,
    /// The last row of each feed.
    last_rows: Vec<u32>,
    /// Rows of the cache, seen as `[slots * kv_heads * max_positions, head_dim]`, that take the rows' keys and values:
    /// `[N * kv_heads, head_dim]`.
    cache_rows: Tensor,
    /// The row that stands at each place of `[slots, T]`, any where none does.
    padded: Tensor,
    /// The place of each row.
    places: Tensor,
    hidden: Tensor,
    num_slots: usize,
    longest_feed: usize,
    /// Positions that some row sees.
    num_seen: usize,
}

impl Pass {
    fn new(config: &ModelConfig, lengths: &[usize], feeds: &[Feed<'_>], device: &candle_core::Device) -> Result<Pass> {
        let num_slots = feeds.iter().map(|feed| feed.slot + 1).max().unwrap_or(0);
        let longest_feed = feeds.iter().map(|feed| feed.tokens.len()).max().unwrap_or(0);
        let num_seen = feeds.iter().map(|feed| lengths[feed.slot] + feed.tokens.len()).max().unwrap_or(0);
        assert!(num_seen <= config.max_positions, "a slot grows past max_positions = {}", config.max_positions);
        let (mut tokens, mut positions, mut last_rows) = (Vec::<TokenId>::new(), Vec::new(), Vec::new());
        let (mut cache_rows, mut places) = (Vec::<u32>::new(), Vec::<u32>::new());
        let (mut padded, mut padded_positions) =
            (vec![0u32; num_slots * longest_feed], vec![0u32; num_slots * longest_feed]);
        for feed in feeds {
            for (index, token) in feed.tokens.iter().enumerate() {
                let position = lengths[feed.slot] + index;
                let place = feed.slot * longest_feed + index;
                (padded[place], padded_positions[place]) = (tokens.len() as u32, position as u32);
                places.push(place as u32);
                let heads = (0..config.num_kv_heads).map(|head| feed.slot * config.num_kv_heads + head);
                cache_rows.extend(heads.map(|head| (head * config.max_positions + position) as u32));
                tokens.push(*token);
                positions.push(position as u32);
            }
            last_rows.push(tokens.len() as u32 - 1);
        }
        let num_cache_rows = cache_rows.len();
        let cache_rows = Tensor::from_vec(cache_rows, (num_cache_rows, 1), device)?;
        Ok(Pass {
            cache_rows: cache_rows.broadcast_as((num_cache_rows, config.head_dim()))?.contiguous()?,
            padded: Tensor::new(padded, device)?,
            places: Tensor::new(places, device)?,
            hidden: hide_future(padded_positions, (num_slots, longest_feed), num_seen, device)?,
            tokens,
            positions,
            last_rows,
            num_slots,
            longest_feed,
            num_seen,
        })
    }

    /// Enters the rows' keys and values in the cache of a block, and attends to what it then holds: `[N, D]`.
    fn attend(&self, cache: &LayerCache, projected: &Projected) -> Result<Tensor> {
        let (num_rows, num_heads, head_dim) = projected.queries.dims3()?;
        for (cache, rows) in [(&cache.keys, &projected.keys), (&cache.values, &projected.values)] {
            let cache = cache.reshape((cache.elem_count() / head_dim, head_dim))?;
            let rows = rows.reshape((self.cache_rows.dim(0)?, head_dim))?;
            cache.scatter_set(&self.cache_rows, &rows, 0)?;
        }
        let seen = |cache: &Tensor| cache.narrow(0, 0, self.num_slots)?.narrow(2, 0, self.num_seen);
        let queries = projected.queries.reshape((num_rows, num_heads * head_dim))?.index_select(&self.padded, 0)?;
        let queries = queries.reshape((self.num_slots, self.longest_feed, num_heads, head_dim))?.transpose(1, 2)?;
        let out = attention(&queries, &seen(&cache.keys)?, &seen(&cache.values)?, &self.hidden)?;
        out.reshape((self.num_slots * self.longest_feed, num_heads * head_dim))?.index_select(&self.places, 0)
    }
}
