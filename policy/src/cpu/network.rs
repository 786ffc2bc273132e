//! Hand-written forward and backward passes over packed rows.
//!
//! Sequences are processed in chunks, so that the activations stay in the cache. Gradient sums continue from the previous chunk,
//! so that the chunk size changes no bit. Candle's autograd computes the same, but it allocates every intermediate, clears and
//! re-adds every gradient, and has a thread pool of its own.

use std::sync::Mutex;

use proto::TokenId;

use super::kernels::{
    self, MatrixView, PackedMatrix, Start, add, attention_backward, attention_forward, matmul, rms_norm,
    rms_norm_backward, swiglu, swiglu_backward,
};
use super::packed::{Linear, PackedLayer, PackedWeights};
use crate::losses::LossPart;
use crate::sampler::{masked_entropy, masked_entropy_backward, masked_logprob, masked_logprob_backward};
use crate::{BatchScores, ChosenToken, LossGrad, Params, Sequence};

/// Rows that are computed together: for small networks, about what fits in the second-level cache.
const CHUNK_ROWS: usize = 256;

/// Computes the log-probability of every chosen token.
pub(crate) fn logprobs(network: &PackedWeights, workspaces: &Workspaces, sequences: &[&Sequence]) -> Vec<f32> {
    let mut workspace = workspaces.take();
    let (mut logprobs, mut rest) = (Vec::new(), sequences);
    while !rest.is_empty() {
        let mut num_rows = 0;
        let fits = |sequence: &&&Sequence| {
            num_rows += sequence.tokens.len();
            num_rows <= CHUNK_ROWS
        };
        let num_sequences = rest.iter().take_while(fits).count().max(1);
        let (sequences, later) = rest.split_at(num_sequences);
        let chunk = Chunk::new(sequences);
        workspace.forward(network, &chunk);
        logprobs.extend(workspace.scored(network, &chunk).map(logprob));
        rest = later;
    }
    workspaces.put_back(workspace);
    logprobs
}

/// Scores all chosen tokens, and adds the gradient of their loss to `gradients`.
pub(crate) fn add_gradients(
    network: &PackedWeights,
    workspaces: &Workspaces,
    part: LossPart<'_>,
    gradients: &mut Params,
) -> BatchScores {
    let mut workspace = workspaces.take();
    let mut scores = BatchScores::default();
    // A tied head has its gradient in the same tensor. Two sums that take turns would depend on where chunks end.
    let num_shared = if network.config.variant.tied_head { network.embed.len() } else { 0 };
    let mut of_inputs = vec![0.0; num_shared];
    for part in part.split(|_, num_tokens| num_tokens <= CHUNK_ROWS) {
        let chunk = Chunk::new(part.sequences);
        workspace.forward(network, &chunk);
        let entropy = |((chosen, logits), is_read): ((&ChosenToken, &[f32]), bool)| {
            if is_read { masked_entropy(logits, &chosen.legal) } else { 0.0 }
        };
        let of_chunk = BatchScores {
            logprobs: workspace.scored(network, &chunk).map(logprob).collect(),
            entropies: workspace.scored(network, &chunk).zip(part.reads_entropies()).map(entropy).collect(),
        };
        workspace.backward(network, &chunk, &part.grad(&of_chunk), gradients, &mut of_inputs);
        scores.logprobs.extend(of_chunk.logprobs);
        scores.entropies.extend(of_chunk.entropies);
    }
    add(&mut gradients.tensors[0][..num_shared], &of_inputs);
    workspaces.put_back(workspace);
    scores
}

fn logprob((chosen, logits): (&ChosenToken, &[f32])) -> f32 {
    masked_logprob(logits, &chosen.legal, chosen.target)
}

/// Some sequences, as packed rows.
struct Chunk<'a> {
    tokens: Vec<TokenId>,
    lengths: Vec<usize>,
    /// Rows that predict chosen tokens.
    chosen_rows: Vec<usize>,
    choices: Vec<&'a ChosenToken>,
}

impl<'a> Chunk<'a> {
    fn new(sequences: &[&'a Sequence]) -> Chunk<'a> {
        let mut chunk = Chunk { tokens: Vec::new(), lengths: Vec::new(), chosen_rows: Vec::new(), choices: Vec::new() };
        for sequence in sequences {
            for chosen in &sequence.chosen {
                chunk.chosen_rows.push(chunk.tokens.len() + chosen.row);
                chunk.choices.push(chosen);
            }
            chunk.tokens.extend(&sequence.tokens);
            chunk.lengths.push(sequence.tokens.len());
        }
        chunk
    }

    /// Position of each row in its sequence.
    fn positions(&self) -> impl Iterator<Item = usize> {
        self.lengths.iter().flat_map(|len| 0..*len)
    }
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

/// Idle workspaces, kept for reuse: the system would clear the pages of new ones in every pass.
#[derive(Default)]
pub(crate) struct Workspaces(Mutex<Vec<Workspace>>);

impl Workspaces {
    fn take(&self) -> Workspace {
        self.0.lock().expect("holders of the lock do not panic").pop().unwrap_or_default()
    }

    fn put_back(&self, workspace: Workspace) {
        self.0.lock().expect("holders of the lock do not panic").push(workspace);
    }
}

/// Buffers, reused across chunks and passes: each is written before it is read.
#[derive(Default)]
struct Workspace {
    layers: Vec<Activations>,
    x: Vec<f32>,
    normed: Vec<f32>,
    gated: Vec<f32>,
    /// `[M, V]`
    logits: Vec<f32>,
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
    logits: Vec<f32>,
    packed: PackedMatrix,
}

impl Workspace {
    fn forward(&mut self, network: &PackedWeights, chunk: &Chunk<'_>) {
        let (width, epsilon) = (network.config.d_model, network.config.variant.rms_norm_eps);
        self.layers.resize_with(network.layers.len(), Activations::default);
        self.x.clear();
        for token in &chunk.tokens {
            let start = *token as usize * width;
            self.x.extend_from_slice(&network.embed[start..start + width]);
        }
        let last_layer = network.layers.len() - 1;
        for (index, (layer, kept)) in network.layers.iter().zip(&mut self.layers).enumerate() {
            std::mem::swap(&mut kept.input, &mut self.x);
            normalise(&kept.input, &layer.attention_norm, epsilon, &mut self.normed);
            linear(&self.normed, &layer.qkv.forward, &mut kept.qkv);
            layer.finish_qkv(epsilon, chunk.positions(), &mut kept.qkv, Some(&mut kept.unnormed));
            let attended_width = layer.shape.queries_dim();
            kept.attended.resize(chunk.tokens.len() * attended_width, 0.0);
            attention_forward(layer.shape, &chunk.lengths, &kept.qkv, &mut kept.attended);
            let residual = if index == last_layer {
                // No later block attends to these rows: only the rows that predict chosen tokens are computed.
                keep_rows(&mut kept.attended, &chunk.chosen_rows, attended_width);
                self.x.clone_from(&kept.input);
                keep_rows(&mut self.x, &chunk.chosen_rows, width);
                &self.x
            } else {
                &kept.input
            };
            linear(&kept.attended, &layer.out.forward, &mut self.normed);
            sum(residual, &self.normed, &mut kept.middle);
            normalise(&kept.middle, &layer.mlp_norm, epsilon, &mut self.normed);
            linear(&self.normed, &layer.gate_up.forward, &mut kept.gate_up);
            self.gated.resize(kept.gate_up.len() / 2, 0.0);
            swiglu(&kept.gate_up, &mut self.gated, network.config.ff_dim);
            linear(&self.gated, &layer.down.forward, &mut self.normed);
            sum(&kept.middle, &self.normed, &mut self.x);
        }
        normalise(&self.x, &network.norm, epsilon, &mut self.normed);
        linear(&self.normed, &network.head.forward, &mut self.logits);
    }

    /// Pairs the chosen tokens with the logits that predict them.
    fn scored<'a>(
        &'a self,
        network: &PackedWeights,
        chunk: &'a Chunk<'a>,
    ) -> impl Iterator<Item = (&'a ChosenToken, &'a [f32])> {
        chunk.choices.iter().copied().zip(self.logits.chunks_exact(network.config.vocabulary_size))
    }

    /// Adds to `gradients`; those of the input rows of a tied embedding go to `of_inputs`, `[V, D]`.
    fn backward(
        &mut self,
        network: &PackedWeights,
        chunk: &Chunk<'_>,
        grads: &[LossGrad],
        gradients: &mut Params,
        of_inputs: &mut [f32],
    ) {
        let (width, epsilon) = (network.config.d_model, network.config.variant.rms_norm_eps);
        let vocabulary = network.config.vocabulary_size;
        let (embed, tensors) = gradients.tensors.split_first_mut().expect("gradients have the config's tensors");
        let mut tensors = tensors.iter_mut().rev();
        let mut next = || tensors.next().expect("gradients have the config's tensors");
        let grad = &mut self.grad;
        zeros(&mut grad.logits, self.logits.len());
        let rows = self.logits.chunks_exact(vocabulary).zip(grad.logits.chunks_exact_mut(vocabulary));
        for (((logits, grad), chosen), of_loss) in rows.zip(&chunk.choices).zip(grads) {
            masked_logprob_backward(logits, &chosen.legal, chosen.target, of_loss.logprob, grad);
            if of_loss.entropy != 0.0 {
                masked_entropy_backward(logits, &chosen.legal, of_loss.entropy, grad);
            }
        }
        if network.config.variant.tied_head {
            linear(&grad.logits, network.head.transposed(), &mut grad.normed);
            add_product(&grad.logits, vocabulary, &self.normed, width, embed, &mut grad.packed);
        } else {
            linear_backward(&self.normed, &network.head, &grad.logits, next(), &mut grad.normed, &mut grad.packed);
        }
        grad.x.resize(self.x.len(), 0.0);
        rms_norm_backward::<false>(&self.x, &network.norm, epsilon, &grad.normed, &mut grad.x, next());
        let last_layer = network.layers.len() - 1;
        for (index, (layer, kept)) in network.layers.iter().zip(&self.layers).enumerate().rev() {
            let (down, gate_up, mlp_norm) = (next(), next(), next());
            let out = next();
            let qk_norm = layer.qk_norm.as_ref().map(|_| [next(), next()]);
            let qkv_bias = layer.qkv_bias.as_ref().map(|_| next());
            let (qkv, attention_norm) = (next(), next());
            linear(&grad.x, layer.down.transposed(), &mut grad.gated);
            grad.gate_up.resize(kept.gate_up.len(), 0.0);
            self.gated.resize(grad.gated.len(), 0.0);
            swiglu_backward(&kept.gate_up, &grad.gated, &mut grad.gate_up, &mut self.gated, network.config.ff_dim);
            add_weight_gradient(&self.gated, &layer.down, &grad.x, down, &mut grad.packed);
            normalise(&kept.middle, &layer.mlp_norm, epsilon, &mut self.normed);
            linear_backward(&self.normed, &layer.gate_up, &grad.gate_up, gate_up, &mut grad.normed, &mut grad.packed);
            rms_norm_backward::<true>(&kept.middle, &layer.mlp_norm, epsilon, &grad.normed, &mut grad.x, mlp_norm);

            linear_backward(&kept.attended, &layer.out, &grad.x, out, &mut grad.attended, &mut grad.packed);
            if index == last_layer {
                spread_rows(&mut grad.x, &chunk.chosen_rows, chunk.tokens.len(), width);
                spread_rows(&mut grad.attended, &chunk.chosen_rows, chunk.tokens.len(), layer.shape.queries_dim());
            }
            grad.qkv.resize(kept.qkv.len(), 0.0);
            attention_backward(layer.shape, &chunk.lengths, &kept.qkv, &grad.attended, &mut grad.qkv);
            layer.rotary.rotate_back(layer.shape, chunk.positions(), &mut grad.qkv);
            if let Some([key_norm, query_norm]) = qk_norm {
                let grads = [query_norm, key_norm];
                qk_norm_backward(layer, epsilon, &kept.unnormed, &mut grad.qkv, grads, &mut grad.normed);
            }
            if let Some(qkv_bias) = qkv_bias {
                grad.qkv.chunks_exact(layer.shape.qkv_dim()).for_each(|row| add(qkv_bias, row));
            }
            normalise(&kept.input, &layer.attention_norm, epsilon, &mut self.normed);
            linear_backward(&self.normed, &layer.qkv, &grad.qkv, qkv, &mut grad.normed, &mut grad.packed);
            rms_norm_backward::<true>(
                &kept.input,
                &layer.attention_norm,
                epsilon,
                &grad.normed,
                &mut grad.x,
                attention_norm,
            );
        }
        let embed = if network.config.variant.tied_head { of_inputs } else { &mut embed[..] };
        for (token, row) in chunk.tokens.iter().zip(grad.x.chunks_exact(width)) {
            let start = *token as usize * width;
            add(&mut embed[start..start + width], row);
        }
    }
}

fn zeros(buffer: &mut Vec<f32>, len: usize) {
    buffer.clear();
    buffer.resize(len, 0.0);
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

/// Writes `grad_out weight^T` and adds `x^T grad_out` to the weight's gradient.
fn linear_backward(
    x: &[f32],
    weight: &Linear,
    grad_out: &[f32],
    grad_weight: &mut [f32],
    grad_x: &mut Vec<f32>,
    packed: &mut PackedMatrix,
) {
    linear(grad_out, weight.transposed(), grad_x);
    add_weight_gradient(x, weight, grad_out, grad_weight, packed);
}

/// Adds `x^T grad_out` to the weight's gradient; `packed` is scratch.
fn add_weight_gradient(
    x: &[f32],
    weight: &Linear,
    grad_out: &[f32],
    grad_weight: &mut [f32],
    packed: &mut PackedMatrix,
) {
    let (inputs, outputs) = (weight.forward.num_rows(), weight.forward.num_columns());
    add_product(x, inputs, grad_out, outputs, grad_weight, packed);
}

/// Adds `left^T right` to `out [left_width, right_width]`; `packed` is scratch.
fn add_product(
    left: &[f32],
    left_width: usize,
    right: &[f32],
    right_width: usize,
    out: &mut [f32],
    packed: &mut PackedMatrix,
) {
    packed.pack(MatrixView::row_major(right, right_width), right.len() / right_width, right_width);
    matmul(MatrixView::row_major(left, left_width).transposed(), left_width, packed, Start::Out, out);
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
