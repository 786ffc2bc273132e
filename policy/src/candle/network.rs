//! The network, top to bottom, in operations that candle differentiates.
//!
//! Candle's own `softmax_last_dim`, `rms_norm` and `rope` are avoided: they silently compute no gradient (candle issues 2168,
//! 3568, 3752).

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm_slow, softmax, swiglu};
use proto::TokenId;

use crate::cpu::kernels::RotaryTable;
use crate::{AttentionShape, ModelConfig, Params, TensorSpec, Variant};

/// One version of the weights on a device.
#[derive(Debug)]
pub(crate) struct CandleWeights {
    pub(crate) config: ModelConfig,
    /// Those of the base, if there is an adapter.
    pub(super) tensors: Vec<Tensor>,
    /// Empty if there is none.
    pub(super) adapter: Vec<Tensor>,
    pub(super) rotary: Rotary,
}

/// Frozen weights on a device, which adapters change.
#[derive(Debug)]
pub(crate) struct CandleBase {
    /// Of the network without an adapter.
    config: ModelConfig,
    pub(super) tensors: Vec<Tensor>,
}

/// Cosines and sines of rotary position embedding, `[max_positions, head_dim / 2]` each.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cosines: Tensor,
    sines: Tensor,
}

/// Queries `[N, heads, head_dim]`, and keys and values `[N, kv_heads, head_dim]`, both rotated.
pub(super) struct Projected {
    pub(super) queries: Tensor,
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

impl CandleWeights {
    pub(crate) fn new(config: &ModelConfig, params: &Params, device: &Device) -> Result<CandleWeights> {
        let (tensors, adapter) = (place(config, params, device)?, Vec::new());
        Ok(CandleWeights { config: config.clone(), tensors, adapter, rotary: Rotary::new(config, device)? })
    }

    /// Places an adapter beside the weights that it changes.
    pub(crate) fn adapted(config: &ModelConfig, base: &CandleBase, adapter: &Params) -> Result<CandleWeights> {
        let device = base.device();
        let (tensors, adapter) = (base.tensors.clone(), place(config, adapter, device)?);
        Ok(CandleWeights { config: config.clone(), tensors, adapter, rotary: Rotary::new(config, device)? })
    }
}

impl CandleBase {
    pub(crate) fn new(config: &ModelConfig, params: &Params, device: &Device) -> Result<CandleBase> {
        Ok(CandleBase { config: config.clone(), tensors: place(config, params, device)? })
    }

    /// Returns the config of the network without an adapter.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn device(&self) -> &Device {
        self.tensors[0].device()
    }
}

/// Places the tensors of a config on a device.
pub(super) fn place(config: &ModelConfig, params: &Params, device: &Device) -> Result<Vec<Tensor>> {
    let place = |(spec, values): (&TensorSpec, &Vec<f32>)| Tensor::from_slice(values, &spec.shape[..], device);
    config.tensors().iter().zip(&params.tensors).map(place).collect()
}

impl Rotary {
    pub(super) fn new(config: &ModelConfig, device: &Device) -> Result<Rotary> {
        let (positions, half) = (config.max_positions, config.head_dim() / 2);
        let table = RotaryTable::new(positions, &config.variant.rope_frequencies(config.head_dim()));
        let (cosines, sines): (Vec<&[f32]>, Vec<&[f32]>) = (0..positions).map(|position| table.at(position)).unzip();
        let place = |rows: Vec<&[f32]>| Tensor::from_vec(rows.concat(), (positions, 1, half), device);
        Ok(Rotary { cosines: place(cosines)?, sines: place(sines)? })
    }

    /// Selects the rows of N positions.
    fn at(&self, positions: &Tensor) -> Result<Rotary> {
        Ok(Rotary { cosines: self.cosines.index_select(positions, 0)?, sines: self.sines.index_select(positions, 0)? })
    }

    /// Rotates `[N, heads, head_dim]`.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.dim(2)? / 2;
        let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let by = |x: &Tensor, factors: &Tensor| x.broadcast_mul(factors);
        let rotated = [
            (by(&low, &self.cosines)? - by(&high, &self.sines)?)?,
            (by(&high, &self.cosines)? + by(&low, &self.sines)?)?,
        ];
        Tensor::cat(&rotated, 2)
    }
}

/// Computes the logits `[M, V]` after M of N rows.
///
/// - `weights`: of the network; `adapter`: its tensors, none if there is no adapter.
/// - `tokens`, `positions`: of each row.
/// - `attend`: given the index of a block, computes the attention of each row over the positions that it sees, `[N, D]`.
pub(super) fn logits(
    config: &ModelConfig,
    (weights, adapter): (&[Tensor], &[Tensor]),
    rotary: &Rotary,
    (tokens, positions): (&[TokenId], &[u32]),
    rows: &[u32],
    mut attend: impl FnMut(usize, Projected) -> Result<Tensor>,
) -> Result<Tensor> {
    let Variant { qkv_bias, qk_norm, tied_head, no_rope_layers, .. } = &config.variant;
    let mut weights = weights.iter();
    let mut next = || weights.next().expect("one tensor for each of the config's specs");
    let norm = |x: &Tensor, weight: &Tensor| rms_norm_slow(x, weight, config.variant.rms_norm_eps);
    let mut adapter = Adapted { scale: config.adapter.map_or(0.0, |adapter| adapter.scale().into()), rest: adapter };
    let embed = next();
    let device = embed.device();
    let num_rows = tokens.len();
    let rotary = rotary.at(&Tensor::new(positions, device)?)?;
    let mut x = embed.index_select(&Tensor::new(tokens, device)?, 0)?; // [N, D]
    for layer in 0..config.num_layers {
        let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = config.attention_shape(layer);
        let mut qkv = adapter.multiply(&norm(&x, next())?, next(), 3)?;
        if *qkv_bias {
            qkv = qkv.broadcast_add(next())?;
        }
        let heads = qkv.reshape((num_rows, num_heads + 2 * num_kv_heads, head_dim))?;
        let mut queries = heads.narrow(1, 0, num_heads)?;
        let mut keys = heads.narrow(1, num_heads, num_kv_heads)?;
        if *qk_norm {
            (queries, keys) = (norm(&queries, next())?, norm(&keys, next())?);
        }
        if !no_rope_layers.contains(&layer) {
            (queries, keys) = (rotary.rotate(&queries)?, rotary.rotate(&keys)?);
        }
        let values = heads.narrow(1, num_heads + num_kv_heads, num_kv_heads)?.contiguous()?;
        let projected = Projected { queries, keys, values };
        x = (x + adapter.multiply(&attend(layer, projected)?, next(), 1)?)?;
        let gate_up = adapter.multiply(&norm(&x, next())?, next(), 2)?;
        x = (x + adapter.multiply(&swiglu(&gate_up)?, next(), 1)?)?;
    }
    let chosen = x.index_select(&Tensor::new(rows, device)?, 0)?;
    let chosen = norm(&chosen, next())?;
    if *tied_head { chosen.matmul(&embed.t()?) } else { chosen.matmul(next()) }
}

/// The tensors of an adapter that are not applied yet.
struct Adapted<'a> {
    scale: f64,
    /// A and B of each projection; empty if there is no adapter.
    rest: &'a [Tensor],
}

impl Adapted<'_> {
    /// Computes `x W`, or with an adapter `x W + s (x A) B`, whose columns are those of a number of projections.
    fn multiply(&mut self, x: &Tensor, weight: &Tensor, num_projections: usize) -> Result<Tensor> {
        let product = x.matmul(weight)?;
        if self.rest.is_empty() {
            return Ok(product);
        }
        let (pairs, rest) = self.rest.split_at(2 * num_projections);
        self.rest = rest;
        let low_rank = |pair: &[Tensor]| (x.matmul(&pair[0])? * self.scale)?.matmul(&pair[1]);
        product + Tensor::cat(&pairs.chunks_exact(2).map(low_rank).collect::<Result<Vec<_>>>()?, 1)?
    }
}

/// Computes attention within B sequences: the query heads that share a key-value head are rows of one product.
///
/// - `queries`: `[B, heads, T, head_dim]`; `keys`, `values`: `[B, kv_heads, L, head_dim]`.
/// - `hidden`: `[B or 1, 1, T, L]`, a mask of [`Hidden`].
///
/// Returns `[B, T, D]`.
pub(super) fn attention(queries: &Tensor, keys: &Tensor, values: &Tensor, hidden: &Tensor) -> Result<Tensor> {
    let (batch, num_heads, time, head_dim) = queries.dims4()?;
    let num_kv_heads = keys.dim(1)?;
    let per_kv_head = num_heads / num_kv_heads;
    let queries = queries.contiguous()?.reshape((batch, num_kv_heads, per_kv_head * time, head_dim))?;
    let scores = (queries.matmul(&keys.t()?)? * (1.0 / (head_dim as f64).sqrt()))?;
    let hidden = Tensor::cat(&vec![hidden; per_kv_head], 2)?;
    let weights = softmax(&scores.broadcast_add(&hidden)?, D::Minus1)?;
    let out = weights.matmul(values)?.reshape((batch, num_heads, time, head_dim))?;
    out.transpose(1, 2)?.reshape((batch, time, num_heads * head_dim))
}

/// What the rows of a pass do not see: 0 if a row sees a position, and large and negative if it does not. Layers with equal
/// windows share a mask.
pub(super) struct Hidden {
    /// By window, `[B, 1, T, L]`.
    masks: Vec<(Option<usize>, Tensor)>,
}

impl Hidden {
    /// Computes the masks of every layer for rows at `positions`, `[B, T]`, and L positions to see.
    pub(super) fn new(
        config: &ModelConfig,
        positions: Vec<u32>,
        (batch, time): (usize, usize),
        len: usize,
        device: &Device,
    ) -> Result<Hidden> {
        let rows = Tensor::from_vec(positions, (batch, 1, time, 1), device)?.to_dtype(DType::F32)?;
        let seen = Tensor::arange(0u32, len as u32, device)?.to_dtype(DType::F32)?;
        let ahead = seen.broadcast_sub(&rows)?;
        let future = ahead.clamp(0f32, 1f32)?;
        let mut hidden = Hidden { masks: Vec::new() };
        for layer in 0..config.num_layers {
            let window = config.attention_shape(layer).window;
            if hidden.find(window).is_none() {
                let mask = match window {
                    Some(window) => ((ahead.neg()? + (1.0 - window as f64))?.clamp(0f32, 1f32)? + &future)?,
                    None => future.clone(),
                };
                hidden.masks.push((window, (mask * -1e9)?));
            }
        }
        Ok(hidden)
    }

    fn find(&self, window: Option<usize>) -> Option<&Tensor> {
        self.masks.iter().find(|(other, _)| *other == window).map(|(_, mask)| mask)
    }

    /// Returns the mask of a layer.
    pub(super) fn of(&self, config: &ModelConfig, layer: usize) -> &Tensor {
        self.find(config.attention_shape(layer).window).expect("every layer has a mask")
    }
}
