use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use proto::TokenId;

use super::network::{self, CandleWeights, Hidden, Projected, attention};
use super::sampler;
use crate::{Draw, Error, Feed, ModelConfig, Policy, Weights};

/// Plays all slots in one pass, with a preallocated key-value cache.
pub(crate) struct CandlePolicy {
    weights: Arc<CandleWeights>,
    /// Number of tokens in each slot.
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

    fn fork(&mut self, from: usize, to: usize, len: usize) -> std::result::Result<(), Error> {
        assert!(len <= self.lengths[from], "expected up to {} tokens of slot {from}, got {len}", self.lengths[from]);
        self.lengths[to] = len;
        if from == to || len == 0 {
            return Ok(());
        }
        for cache in self.layers.iter().flat_map(|LayerCache { keys, values }| [keys, values]) {
            // `Tensor::copy` would copy the memory of all slots.
            let shared = cache.narrow(0, from, 1)?.narrow(2, 0, len)?.force_contiguous()?;
            cache.narrow(0, to, 1)?.slice_set(&shared, 2, 0)?;
        }
        Ok(())
    }

    fn feed(&mut self, feeds: &[Feed<'_>]) -> std::result::Result<(), Error> {
        let CandlePolicy { weights, lengths, layers, .. } = self;
        let pass = Pass::new(&weights.config, lengths, feeds, weights.tensors[0].device())?;
        let logits = network::logits(
            &weights.config,
            (&weights.tensors[..], &weights.adapter[..]),
            &weights.rotary,
            (&pass.tokens, &pass.positions),
            &pass.last_rows,
            |layer, projected| pass.attend(&layers[layer], pass.hidden.of(&weights.config, layer), &projected),
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

/// An index that candle's scatter passes over.
const NOWHERE: u32 = u32::MAX;

/// Layout of the rows of one pass. Rows are packed except in attention, which takes the slots up to the last one fed, each padded
/// to the length of the longest feed. Results of padding are computed and ignored.
struct Pass {
    tokens: Vec<TokenId>,
    /// Position of each row in its slot.
    positions: Vec<u32>,
    /// The last row of each feed.
    last_rows: Vec<u32>,
    /// The position in the cache that each place of `[slots, T]` is entered at, spread over keys and values:
    /// `[slots, kv_heads, T, head_dim]`. Padding has [`NOWHERE`].
    cache_positions: Tensor,
    /// The row at each place of `[slots, T]`, any row at places of padding.
    padded: Tensor,
    /// The place of each row.
    places: Tensor,
    hidden: Hidden,
    num_slots: usize,
    longest_feed: usize,
    /// Number of positions that some row sees.
    num_seen: usize,
}

impl Pass {
    fn new(config: &ModelConfig, lengths: &[usize], feeds: &[Feed<'_>], device: &candle_core::Device) -> Result<Pass> {
        let num_slots = feeds.iter().map(|feed| feed.slot + 1).max().unwrap_or(0);
        let longest_feed = feeds.iter().map(|feed| feed.tokens.len()).max().unwrap_or(0);
        let num_seen = feeds.iter().map(|feed| lengths[feed.slot] + feed.tokens.len()).max().unwrap_or(0);
        assert!(num_seen <= config.max_positions, "a slot grows past max_positions = {}", config.max_positions);
        let (mut tokens, mut positions, mut last_rows) = (Vec::<TokenId>::new(), Vec::new(), Vec::new());
        let mut places = Vec::<u32>::new();
        let mut cache_positions = vec![NOWHERE; num_slots * longest_feed];
        let (mut padded, mut padded_positions) =
            (vec![0u32; num_slots * longest_feed], vec![0u32; num_slots * longest_feed]);
        for feed in feeds {
            for (index, token) in feed.tokens.iter().enumerate() {
                let position = lengths[feed.slot] + index;
                let place = feed.slot * longest_feed + index;
                (padded[place], padded_positions[place]) = (tokens.len() as u32, position as u32);
                places.push(place as u32);
                cache_positions[place] = position as u32;
                tokens.push(*token);
                positions.push(position as u32);
            }
            last_rows.push(tokens.len() as u32 - 1);
        }
        let cache_positions = Tensor::from_vec(cache_positions, (num_slots, 1, longest_feed, 1), device)?;
        let spread = (num_slots, config.num_kv_heads, longest_feed, config.head_dim());
        Ok(Pass {
            cache_positions: cache_positions.broadcast_as(spread)?.contiguous()?,
            padded: Tensor::new(padded, device)?,
            places: Tensor::new(places, device)?,
            hidden: Hidden::new(config, padded_positions, (num_slots, longest_feed), num_seen, device)?,
            tokens,
            positions,
            last_rows,
            num_slots,
            longest_feed,
            num_seen,
        })
    }

    /// Writes the rows' keys and values to the cache of a block, and attends to the result: `[N, D]`.
    fn attend(&self, cache: &LayerCache, hidden: &Tensor, projected: &Projected) -> Result<Tensor> {
        // `[N, heads, head_dim]` to `[slots, heads, T, head_dim]`
        let by_slot = |rows: &Tensor| {
            let (num_rows, num_heads, head_dim) = rows.dims3()?;
            let padded = rows.reshape((num_rows, num_heads * head_dim))?.index_select(&self.padded, 0)?;
            padded.reshape((self.num_slots, self.longest_feed, num_heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        for (cache, rows) in [(&cache.keys, &projected.keys), (&cache.values, &projected.values)] {
            cache.narrow(0, 0, self.num_slots)?.scatter_set(&self.cache_positions, &by_slot(rows)?, 2)?;
        }
        let seen = |cache: &Tensor| cache.narrow(0, 0, self.num_slots)?.narrow(2, 0, self.num_seen);
        let queries = by_slot(&projected.queries)?;
        let (_, num_heads, _, head_dim) = queries.dims4()?;
        let out = attention(&queries, &seen(&cache.keys)?, &seen(&cache.values)?, hidden)?;
        out.reshape((self.num_slots * self.longest_feed, num_heads * head_dim))?.index_select(&self.places, 0)
    }
}
