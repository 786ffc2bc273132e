//! Hand-written forward and backward passes over packed rows.
//!
//! Sequences are processed in chunks, so that the activations stay in the cache. Gradient sums continue from the previous chunk,
//! so that the chunk size changes no bit unless sequences share rows. Candle's autograd computes the same, but it allocates every
//! intermediate, clears and re-adds every gradient, and has a thread pool of its own.

use std::collections::BTreeMap;
use std::slice;
use std::sync::{Arc, Mutex};

use proto::TokenId;

use super::chunk::{Choice, Chunk, MaxRows, fits};
use super::gradients::{BlockGradients, NetworkGradients, PackedAdapter, Scratch};
use super::kernels::{
    self, MatrixView, PackedMatrix, Start, add, attention_backward, attention_forward, matmul, matmul_transposed,
    rms_norm, rms_norm_backward, swiglu, swiglu_backward,
};
use super::packed::{PackedLayer, PackedWeights};
use super::threads;
use crate::losses::LossPart;
use crate::sampler::{masked_entropy, masked_entropy_backward, masked_logprob, masked_logprob_backward};
use crate::{BatchScores, ChosenToken, LossGrad, ModelConfig, Params, Sequence};

/// Computes the log-probability of every chosen token, chunk after chunk on any number of threads.
pub(crate) fn logprobs(
    network: &PackedWeights,
    workspaces: &Workspaces,
    num_threads: usize,
    sequences: &[&Sequence],
) -> Vec<f32> {
    let mut chunks: Vec<(&[&Sequence], Vec<f32>)> = Vec::new();
    let mut rest = sequences;
    while !rest.is_empty() {
        let mut fits = fits(max_rows(&network.config));
        let indexed = rest.iter().enumerate();
        let taken = indexed.take_while(|(index, sequence)| fits(slice::from_ref(*sequence)) || *index == 0);
        let num_sequences = taken.count();
        let (sequences, later) = rest.split_at(num_sequences);
        chunks.push((sequences, Vec::new()));
        rest = later;
    }
    threads::for_each(num_threads.min(chunks.len()), &mut chunks, |(sequences, logprobs)| {
        let mut workspace = workspaces.take();
        let chunk = Chunk::new(sequences);
        workspace.forward(network, &chunk, 1);
        logprobs.extend(workspace.scored(network, &chunk).map(logprob));
        workspaces.put_back(workspace);
    });
    chunks.into_iter().flat_map(|(_, logprobs)| logprobs).collect()
}

/// A version in training.
pub(crate) struct Trained {
    pub(crate) network: Arc<PackedWeights>,
    /// The adapter that is trained alone, if there is one.
    pub(crate) adapter: Option<PackedAdapter>,
}

/// Scores all chosen tokens, and adds the gradient of their loss to `gradients`.
pub(crate) fn add_gradients(
    trained: &Trained,
    workspaces: &Workspaces,
    part: LossPart<'_>,
    gradients: &mut Params,
) -> BatchScores {
    let mut workspace = workspaces.take();
    let network = trained.network.as_ref();
    let (mut scores, mut of_inputs, mut rest) = (BatchScores::default(), InputGradients::new(), part);
    while !rest.is_empty() {
        let (part, later) = rest.split(fits(max_rows(&network.config)));
        let chunk = Chunk::new(part.sequences);
        workspace.forward(network, &chunk, network.layers.len());
        let entropy = |((chosen, logits), is_read): ((&ChosenToken, &[f32]), bool)| {
            if is_read { masked_entropy(logits, &chosen.legal) } else { 0.0 }
        };
        let of_chunk = BatchScores {
            logprobs: workspace.scored(network, &chunk).map(logprob).collect(),
            entropies: workspace.scored(network, &chunk).zip(part.reads_entropies()).map(entropy).collect(),
        };
        workspace.backward(trained, &chunk, &part.grad(&of_chunk), gradients, &mut of_inputs);
        scores.logprobs.extend(of_chunk.logprobs);
        scores.entropies.extend(of_chunk.entropies);
        rest = later;
    }
    for (token, row) in of_inputs {
        add(embedding(&mut gradients.tensors[0], token, network.config.d_model), &row);
    }
    workspaces.put_back(workspace);
    scores
}

/// Gradients of the embeddings of a tied network's input tokens, `[D]` each. The head has its gradient in the same tensor: two
/// sums that take turns would depend on where chunks end.
type InputGradients = BTreeMap<TokenId, Vec<f32>>;

/// Returns how many rows are computed together. Activations of small networks stay in the second-level cache. Large networks do not
/// fit, so a chunk holds whole groups of answers to a prompt rather than compute it again, as far as that takes no more than a GiB.
fn max_rows(config: &ModelConfig) -> MaxRows {
    let layer_bytes = size_of::<f32>() * config.num_parameters() / config.num_layers;
    if layer_bytes < LARGE_LAYER_BYTES {
        return MaxRows { of_any: 256, of_shared: 256 };
    }
    // What [`Activations`] keep of a row in all layers, and its logits: 0.9 MB for a network of 135M weights.
    let shape = config.attention_shape(0);
    let of_layer = 2 * config.d_model + shape.qkv_dim() + shape.queries_dim() + 2 * config.ff_dim;
    let row_bytes = size_of::<f32>() * (config.num_layers * of_layer + config.vocabulary_size);
    MaxRows { of_any: 384, of_shared: (MAX_SHARED_BYTES / row_bytes).clamp(384, 1024) }
}

/// Most bytes of the activations of a chunk whose sequences share rows.
const MAX_SHARED_BYTES: usize = 1 << 30;

/// More than a second-level cache holds, with the share of a layer in embedding and head.
const LARGE_LAYER_BYTES: usize = 8 << 20;

fn logprob((chosen, logits): (&ChosenToken, &[f32])) -> f32 {
    masked_logprob(logits, &chosen.legal, chosen.target)
}

fn embedding(embed: &mut [f32], token: TokenId, width: usize) -> &mut [f32] {
    &mut embed[token as usize * width..][..width]
}

/// Activations that a block keeps for its backward pass; all `[N, ...]`, in the last block `[M, ...]` from `attended` on.
#[derive(Default)]
struct Activations {
    input: Vec<f32>,
    /// Before the norms of queries and keys, if there are any.
    unnormed: Vec<f32>,
    /// Queries and keys rotated.
    qkv: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    gate_up: Vec<f32>,
}

/// Idle workspaces, kept for reuse: the system would clear the pages of new ones in every pass. Large ones are not kept, since an actor
/// in the same process needs the memory between updates.
#[derive(Default)]
pub(crate) struct Workspaces(Mutex<Vec<Workspace>>);

/// Largest workspace that is kept.
const IDLE_BYTES: usize = 64 << 20;

impl Workspaces {
    fn take(&self) -> Workspace {
        self.0.lock().expect("holders of the lock do not panic").pop().unwrap_or_default()
    }

    fn put_back(&self, workspace: Workspace) {
        if workspace.num_bytes() <= IDLE_BYTES {
            self.0.lock().expect("holders of the lock do not panic").push(workspace);
        }
    }
}

/// Buffers, reused across chunks and passes: each is written before it is read.
#[derive(Default)]
struct Workspace {
    layers: Vec<Activations>,
    x: Vec<f32>,
    normed: Vec<f32>,
    gated: Vec<f32>,
    /// `[M, V]`; the backward pass replaces them by their gradients.
    logits: Vec<f32>,
    /// Logits of a row.
    row: Vec<f32>,
    grad: Grad,
}

#[derive(Default)]
struct Grad {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    scratch: Scratch,
}

impl Workspace {
    /// Returns the size of what a block keeps and of the logits, the bulk of a large workspace.
    fn num_bytes(&self) -> usize {
        let of_block = |kept: &Activations| {
            let Activations { input, unnormed, qkv, attended, middle, gate_up } = kept;
            [input, unnormed, qkv, attended, middle, gate_up].iter().map(|rows| rows.capacity()).sum::<usize>()
        };
        size_of::<f32>() * (self.layers.iter().map(of_block).sum::<usize>() + self.logits.capacity())
    }

    /// Computes the logits after the chosen rows. `num_kept` blocks keep their activations: all of them for a backward pass, one if none
    /// follows.
    fn forward(&mut self, network: &PackedWeights, chunk: &Chunk<'_>, num_kept: usize) {
        let (width, epsilon) = (network.config.d_model, network.config.variant.rms_norm_eps);
        if self.layers.len() < num_kept {
            self.layers.resize_with(num_kept, Activations::default);
        }
        self.x.clear();
        network.append_embeddings(chunk.tokens.iter(), &mut self.x);
        let last_layer = network.layers.len() - 1;
        for (index, layer) in network.layers.iter().enumerate() {
            let kept = &mut self.layers[index % num_kept];
            std::mem::swap(&mut kept.input, &mut self.x);
            normalise(&kept.input, &layer.attention_norm, epsilon, &mut self.normed);
            linear(&self.normed, &layer.qkv, &mut kept.qkv);
            layer.finish_qkv(epsilon, chunk.positions(), &mut kept.qkv, Some(&mut kept.unnormed));
            let attended_width = layer.shape.queries_dim();
            kept.attended.resize(chunk.tokens.len() * attended_width, 0.0);
            attention_forward(layer.shape, &chunk.segments, &kept.qkv, &mut kept.attended);
            let residual = if index == last_layer {
                // No later block attends to these rows: only the rows that predict chosen tokens are computed.
                keep_rows(&mut kept.attended, &chunk.chosen_rows, attended_width);
                self.x.clone_from(&kept.input);
                keep_rows(&mut self.x, &chunk.chosen_rows, width);
                &self.x
            } else {
                &kept.input
            };
            linear(&kept.attended, &layer.out, &mut self.normed);
            sum(residual, &self.normed, &mut kept.middle);
            normalise(&kept.middle, &layer.mlp_norm, epsilon, &mut self.normed);
            linear(&self.normed, &layer.gate_up, &mut kept.gate_up);
            self.gated.resize(kept.gate_up.len() / 2, 0.0);
            swiglu(&kept.gate_up, &mut self.gated, network.config.ff_dim);
            linear(&self.gated, &layer.down, &mut self.normed);
            sum(&kept.middle, &self.normed, &mut self.x);
        }
        normalise(&self.x, &network.norm, epsilon, &mut self.normed);
        linear(&self.normed, &network.head, &mut self.logits);
    }

    /// Pairs the chosen tokens with the logits that predict them.
    fn scored<'a>(
        &'a self,
        network: &PackedWeights,
        chunk: &'a Chunk<'a>,
    ) -> impl Iterator<Item = (&'a ChosenToken, &'a [f32])> {
        let vocabulary = network.config.vocabulary_size;
        let logits = move |index: usize| &self.logits[index * vocabulary..][..vocabulary];
        chunk.choices.iter().map(move |Choice { chosen, index }| (*chosen, logits(*index)))
    }

    /// Replaces the logits by their gradients, `[M, V]`.
    fn logits_backward(&mut self, vocabulary: usize, choices: &[Choice<'_>], grads: &[LossGrad]) {
        let mut by_row: Vec<(&Choice<'_>, &LossGrad)> = choices.iter().zip(grads).collect();
        by_row.sort_by_key(|(choice, _)| choice.index);
        for of_row in by_row.chunk_by(|(left, _), (right, _)| left.index == right.index) {
            let grad = &mut self.logits[of_row[0].0.index * vocabulary..][..vocabulary];
            self.row.clear();
            self.row.extend_from_slice(grad);
            grad.fill(0.0);
            for (Choice { chosen, .. }, of_loss) in of_row {
                masked_logprob_backward(&self.row, &chosen.legal, chosen.target, of_loss.logprob, grad);
                if of_loss.entropy != 0.0 {
                    masked_entropy_backward(&self.row, &chosen.legal, of_loss.entropy, grad);
                }
            }
        }
    }

    /// Adds to `gradients`; those of the input rows of a tied embedding go to `of_inputs`.
    fn backward(
        &mut self,
        trained: &Trained,
        chunk: &Chunk<'_>,
        grads: &[LossGrad],
        gradients: &mut Params,
        of_inputs: &mut InputGradients,
    ) {
        let Trained { network, adapter } = trained;
        let config = &network.config;
        let (width, epsilon, ff_dim) = (config.d_model, config.variant.rms_norm_eps, config.ff_dim);
        let NetworkGradients { mut embed, blocks, norm, head } =
            NetworkGradients::new(config, adapter.as_ref(), gradients);
        self.logits_backward(config.vocabulary_size, &chunk.choices, grads);
        let (grad, grad_logits) = (&mut self.grad, &self.logits);
        linear_transposed(grad_logits, &network.head, &mut grad.normed);
        if let Some(head) = head {
            grad.scratch.add_product(&self.normed, width, grad_logits, config.vocabulary_size, head);
        } else if let Some(embed) = &mut embed {
            grad.scratch.add_product(grad_logits, config.vocabulary_size, &self.normed, width, embed);
        }
        grad.x.resize(self.x.len(), 0.0);
        let norm = grad.scratch.vector(norm, width);
        rms_norm_backward::<false>(&self.x, &network.norm, epsilon, &grad.normed, &mut grad.x, norm);
        let last_layer = network.layers.len() - 1;
        let layers = network.layers.iter().zip(&self.layers).zip(blocks);
        for (index, ((layer, kept), block)) in layers.enumerate().rev() {
            let BlockGradients { attention_norm, qkv, qkv_bias, qk_norm, out, mlp_norm, gate_up, down } = block;
            let (attended_width, qkv_width) = (layer.shape.queries_dim(), layer.shape.qkv_dim());
            linear_transposed(&grad.x, &layer.down, &mut grad.gated);
            grad.gate_up.resize(kept.gate_up.len(), 0.0);
            self.gated.resize(grad.gated.len(), 0.0);
            swiglu_backward(&kept.gate_up, &grad.gated, &mut grad.gate_up, &mut self.gated, ff_dim);
            down.add(&self.gated, ff_dim, &grad.x, width, &mut grad.scratch);
            normalise(&kept.middle, &layer.mlp_norm, epsilon, &mut self.normed);
            linear_transposed(&grad.gate_up, &layer.gate_up, &mut grad.normed);
            gate_up.add(&self.normed, width, &grad.gate_up, 2 * ff_dim, &mut grad.scratch);
            let mlp_norm = grad.scratch.vector(mlp_norm, width);
            rms_norm_backward::<true>(&kept.middle, &layer.mlp_norm, epsilon, &grad.normed, &mut grad.x, mlp_norm);

            linear_transposed(&grad.x, &layer.out, &mut grad.attended);
            out.add(&kept.attended, attended_width, &grad.x, width, &mut grad.scratch);
            if index == last_layer {
                spread_rows(&mut grad.x, &chunk.chosen_rows, chunk.tokens.len(), width);
                spread_rows(&mut grad.attended, &chunk.chosen_rows, chunk.tokens.len(), attended_width);
            }
            grad.qkv.resize(kept.qkv.len(), 0.0);
            attention_backward(layer.shape, &chunk.segments, &kept.qkv, &grad.attended, &mut grad.qkv);
            layer.rotary.rotate_back(layer.shape, chunk.positions(), &mut grad.qkv);
            if layer.qk_norm.is_some() {
                let grads = grad.scratch.vectors(qk_norm, layer.shape.head_dim);
                qk_norm_backward(layer, epsilon, &kept.unnormed, &mut grad.qkv, grads, &mut grad.normed);
            }
            if let Some(qkv_bias) = qkv_bias {
                grad.qkv.chunks_exact(qkv_width).for_each(|row| add(qkv_bias, row));
            }
            normalise(&kept.input, &layer.attention_norm, epsilon, &mut self.normed);
            qkv.add(&self.normed, width, &grad.qkv, qkv_width, &mut grad.scratch);
            if index == 0 && embed.is_none() {
                // Nothing before the first block is trained.
                return;
            }
            linear_transposed(&grad.qkv, &layer.qkv, &mut grad.normed);
            let attention_norm = grad.scratch.vector(attention_norm, width);
            rms_norm_backward::<true>(
                &kept.input,
                &layer.attention_norm,
                epsilon,
                &grad.normed,
                &mut grad.x,
                attention_norm,
            );
        }
        let Some(embed) = embed else { return };
        for (token, row) in chunk.tokens.iter().zip(grad.x.chunks_exact(width)) {
            if config.variant.tied_head {
                add(of_inputs.entry(*token).or_insert_with(|| vec![0.0; width]), row);
            } else {
                add(embedding(embed, *token, width), row);
            }
        }
    }
}

pub(crate) fn normalise(x: &[f32], weight: &[f32], epsilon: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    rms_norm(x, weight, epsilon, out);
}

fn sum(x: &[f32], y: &[f32], out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    kernels::sum(x, y, out);
}

pub(crate) fn linear(x: &[f32], weight: &PackedMatrix, out: &mut Vec<f32>) {
    let inputs = weight.num_rows();
    let num_rows = x.len() / inputs;
    out.resize(num_rows * weight.num_columns(), 0.0);
    matmul(MatrixView::row_major(x, inputs), num_rows, weight, Start::Zero, out);
}

/// Multiplies gradients of a product's rows by the transpose of its matrix.
fn linear_transposed(grad: &[f32], weight: &PackedMatrix, out: &mut Vec<f32>) {
    let outputs = weight.num_columns();
    let num_rows = grad.len() / outputs;
    out.resize(num_rows * weight.num_rows(), 0.0);
    matmul_transposed(MatrixView::row_major(grad, outputs), num_rows, weight, out);
}

/// Converts gradients of normalised query and key heads to gradients of the heads before the norms, in place, and adds to the
/// gradients of the norms' weights, queries first.
fn qk_norm_backward(
    layer: &PackedLayer,
    epsilon: f32,
    unnormed: &[f32],
    grad_qkv: &mut [f32],
    grad_norms: [&mut Vec<f32>; 2],
    scratch: &mut Vec<f32>,
) {
    let row_len = layer.shape.qkv_dim();
    let norms = layer.qk_norm.as_ref().expect("a layer with norms");
    for ((columns, norm), grad_norm) in layer.qk_columns().into_iter().zip(norms).zip(grad_norms) {
        for (row, grad_row) in unnormed.chunks_exact(row_len).zip(grad_qkv.chunks_exact_mut(row_len)) {
            let grad = &mut grad_row[columns.clone()];
            scratch.clear();
            scratch.extend_from_slice(grad);
            rms_norm_backward::<false>(&row[columns.clone()], norm, epsilon, scratch, grad, grad_norm);
        }
    }
}

/// Moves the given rows, which ascend, to the front and drops the others.
pub(crate) fn keep_rows(x: &mut Vec<f32>, rows: &[usize], width: usize) {
    for (index, row) in rows.iter().enumerate() {
        x.copy_within(row * width..(row + 1) * width, index * width);
    }
    x.truncate(rows.len() * width);
}

/// Undoes [`keep_rows`], with zeros for the rows that were dropped.
fn spread_rows(x: &mut Vec<f32>, rows: &[usize], num_rows: usize, width: usize) {
    x.resize(num_rows * width, 0.0);
    for (index, row) in rows.iter().enumerate().rev() {
        if *row > index {
            x.copy_within(index * width..(index + 1) * width, row * width);
            x[index * width..(index + 1) * width].fill(0.0);
        }
    }
}
