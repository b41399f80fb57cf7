//! A device's operations, for tables of cases that hold everything in the host's memory.
//!
//! Activations are f32 on the host and whatever the device computes with there: bring numbers
//! that have no more digits (`Rng::activations`), and what comes back is widened. Everything
//! else (weights, caches, ids, logits) is copied as it is. Outputs lie in memory that was poisoned,
//! and after every operation the device is asked whether it failed.

use half::{bf16, f16};
use tokenmill::formats::{Format, PackedMatrix, Quantized};
use tokenmill::ops::args::*;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::cuda::launcher::Launcher;
use tokenmill::ops::kv_tensor::{KvTensor, KvView, KvViewMut};
use tokenmill::ops::{Ops, OpsError, StepLimits};
use tokenmill::output::SampledToken;
use tokenmill::tensor::{DType, Shape, Tensor, View, ViewMut};

use crate::support::cast;

/// Implements [`Ops`] for tensors of the host.
pub struct OnDevice<L> {
    ops: CudaOps<L>,
    activations: DType,
}

impl<L: Launcher> OnDevice<L> {
    /// Operations on activations of this dtype.
    pub fn new(launcher: L, activations: DType) -> OnDevice<L> {
        OnDevice::of(CudaOps::new(launcher), activations)
    }

    /// These operations, on activations of this dtype.
    pub fn of(ops: CudaOps<L>, activations: DType) -> OnDevice<L> {
        OnDevice { ops, activations }
    }

    /// A tensor without values.
    fn empty(&self, dtype: DType, shape: Shape) -> Tensor {
        self.ops.launcher().allocate(dtype, shape).unwrap()
    }

    /// A copy of a tensor as it is.
    fn copy(&self, tensor: View<'_>) -> Tensor {
        let mut copy = self.empty(tensor.dtype(), tensor.shape());
        self.ops.launcher().upload(copy.view_mut(), tensor.bytes());
        copy
    }

    /// A copy of f32 activations in the device's dtype.
    fn narrow(&self, tensor: View<'_>) -> Tensor {
        let narrow = cast(tensor.as_slice::<f32>(), self.activations, tensor.shape());
        self.copy(narrow.view())
    }

    /// A matrix as the device arranges it at load.
    fn matrix(&self, matrix: &PackedMatrix) -> PackedMatrix {
        let quantized = matrix.quantized.as_ref().map(|quantized| Quantized {
            grid: quantized.grid,
            scales: quantized.scales.to_owned_memory(),
            zero_points: quantized.zero_points.as_ref().map(Tensor::to_owned_memory),
        });
        let data = matrix.data.to_owned_memory();
        // What is dense would get the dtype of the device's activations then; tables are read as
        // they are.
        if matches!(matrix.format, Format::Dense | Format::DenseBlocks) {
            return PackedMatrix { data: self.copy(data.view()), quantized, ..*matrix };
        }
        self.ops.arrange(PackedMatrix { data, quantized, ..*matrix }).unwrap()
    }

    fn cache(&self, cache: KvView<'_>) -> KvTensor {
        KvTensor { data: self.copy(cache.data), scales: cache.scales.map(|s| self.copy(s)) }
    }

    /// Panics with the device's words when something failed.
    fn check(&self) {
        let result = self.ops.launcher().synchronize();
        result.unwrap_or_else(|error| panic!("{}: {error}", self.name()));
    }

    /// Brings activations back.
    fn widen(&self, mut to: ViewMut<'_>, from: &Tensor) {
        self.check();
        let mut bytes = vec![0; from.size_bytes()];
        self.ops.launcher().download(&mut bytes, from.view());
        let words = bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
        let widened: Vec<f32> = match from.dtype() {
            DType::BF16 => words.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            DType::F16 => words.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            DType::F32 => {
                bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
            }
            other => panic!("activations of {other}"),
        };
        to.reborrow().into_mut_slice().copy_from_slice(&widened);
    }

    /// Brings a cache back.
    fn restore(&self, to: &mut KvViewMut<'_>, from: &KvTensor) {
        self.check();
        self.restore_bytes(to.data.reborrow(), &from.data);
        if let (Some(to), Some(from)) = (&mut to.scales, &from.scales) {
            self.restore_bytes(to.reborrow(), from);
        }
    }

    fn restore_bytes(&self, to: ViewMut<'_>, from: &Tensor) {
        self.ops.launcher().download(host_bytes_mut(to), from.view());
    }
}

fn host_bytes_mut(mut view: ViewMut<'_>) -> &mut [u8] {
    let len_bytes = view.shape().len() * view.dtype().size_bytes();
    // SAFETY: the view borrows as many bytes of the host's exclusively, and any byte is valid.
    unsafe { std::slice::from_raw_parts_mut(view.address(), len_bytes) }
}

impl<L: Launcher> Ops for OnDevice<L> {
    fn name(&self) -> String {
        format!("{} with {}", self.ops.name(), self.activations)
    }

    fn activation_dtype(&self) -> DType {
        self.activations
    }

    fn reserve(&self, limits: &StepLimits) -> Result<(), OpsError> {
        self.ops.reserve(limits)
    }

    fn embed(&self, args: EmbedArgs<'_>) {
        let (table, token_ids) = (self.matrix(args.table), self.copy(args.token_ids));
        let mut out = self.empty(self.activations, args.out.shape());
        let token_ids = token_ids.view();
        self.ops.embed(EmbedArgs { out: out.view_mut(), table: &table, token_ids });
        self.widen(args.out, &out);
    }

    fn norm(&self, args: NormArgs<'_>) {
        let (x, weight) = (self.narrow(args.x), self.copy(args.weight));
        let mut out = self.empty(self.activations, args.out.shape());
        let (x, weight, eps) = (x.view(), weight.view(), args.eps);
        self.ops.norm(NormArgs { out: out.view_mut(), x, weight, eps });
        self.widen(args.out, &out);
    }

    fn add_norm(&self, args: AddNormArgs<'_>) {
        let (x, weight) = (self.narrow(args.x), self.copy(args.weight));
        let mut residual = self.narrow(args.residual.as_view());
        let mut out = self.empty(self.activations, args.out.shape());
        self.ops.add_norm(AddNormArgs {
            out: out.view_mut(),
            residual: residual.view_mut(),
            x: x.view(),
            weight: weight.view(),
            eps: args.eps,
        });
        self.widen(args.residual, &residual);
        self.widen(args.out, &out);
    }

    fn layer_norm(&self, args: LayerNormArgs<'_>) {
        let (x, weight) = (self.narrow(args.x), self.copy(args.weight));
        let bias = args.bias.map(|bias| self.copy(bias));
        let mut residual = args.residual.as_ref().map(|sum| self.narrow(sum.as_view()));
        let mut out = self.empty(self.activations, args.out.shape());
        self.ops.layer_norm(LayerNormArgs {
            out: out.view_mut(),
            residual: residual.as_mut().map(Tensor::view_mut),
            x: x.view(),
            weight: weight.view(),
            bias: bias.as_ref().map(Tensor::view),
            eps: args.eps,
        });
        if let (Some(to), Some(from)) = (args.residual, &residual) {
            self.widen(to, from);
        }
        self.widen(args.out, &out);
    }

    fn rope(&self, args: RopeArgs<'_>) {
        let (mut q, mut k) = (self.narrow(args.q.as_view()), self.narrow(args.k.as_view()));
        let positions = self.copy(args.positions);
        let (cos, sin) = (self.copy(args.cos), self.copy(args.sin));
        self.ops.rope(RopeArgs {
            q: q.view_mut(),
            k: k.view_mut(),
            positions: positions.view(),
            cos: cos.view(),
            sin: sin.view(),
            style: args.style,
        });
        self.widen(args.q, &q);
        self.widen(args.k, &k);
    }

    fn matmul(&self, args: MatmulArgs<'_>) {
        let x = self.narrow(args.x);
        let on_host: Vec<_> = args.projections.into_iter().collect();
        let mut on_device: Vec<_> = on_host
            .iter()
            .map(|projection| {
                let out = self.empty(self.activations, projection.out.shape());
                let bias = projection.bias.map(|bias| self.copy(bias));
                (out, self.matrix(projection.weight), bias)
            })
            .collect();
        let projections = on_device.iter_mut().map(|(out, weight, bias)| Projection {
            out: out.view_mut(),
            weight,
            bias: bias.as_ref().map(Tensor::view),
        });
        self.ops.matmul(MatmulArgs { x: x.view(), projections: projections.collect() });
        for (to, (from, ..)) in on_host.into_iter().zip(&on_device) {
            self.widen(to.out, from);
        }
    }

    fn gated_matmul(&self, args: GatedMatmulArgs<'_>) {
        let x = self.narrow(args.x);
        let weight = |(weight, bias): WeightAndBias<'_>| {
            (self.matrix(weight), bias.map(|bias| self.copy(bias)))
        };
        let (gate, up) = (weight(args.gate), weight(args.up));
        let [mut out, mut a, mut b] =
            [(); 3].map(|()| self.empty(self.activations, args.out.shape()));
        self.ops.gated_matmul(GatedMatmulArgs {
            out: out.view_mut(),
            x: x.view(),
            gate: (&gate.0, gate.1.as_ref().map(Tensor::view)),
            up: (&up.0, up.1.as_ref().map(Tensor::view)),
            activation: args.activation,
            scratch: [a.view_mut(), b.view_mut()],
        });
        self.widen(args.out, &out);
    }

    fn route_experts(&self, mut args: RouteExpertsArgs<'_>) {
        let logits = self.copy(args.logits);
        let bias = args.bias.map(|bias| self.copy(bias));
        let mut ids = self.empty(DType::U32, args.expert_ids.shape());
        let mut weights = self.empty(DType::F32, args.weights.shape());
        self.ops.route_experts(RouteExpertsArgs {
            expert_ids: ids.view_mut(),
            weights: weights.view_mut(),
            logits: logits.view(),
            bias: bias.as_ref().map(Tensor::view),
            routing: args.routing,
        });
        self.check();
        self.restore_bytes(args.expert_ids.reborrow(), &ids);
        self.restore_bytes(args.weights.reborrow(), &weights);
    }

    fn expert_mlp(&self, args: ExpertMlpArgs<'_>) {
        let expert = |Expert { gate, up, down }: &Expert| Expert {
            gate: self.matrix(gate),
            up: self.matrix(up),
            down: self.matrix(down),
        };
        let experts = args.experts.iter().map(expert).collect();
        let experts = self.ops.index_experts(experts).unwrap();
        let x = self.narrow(args.x);
        let (ids, weights) = (self.copy(args.expert_ids), self.copy(args.weights));
        let mut out = self.empty(self.activations, args.out.shape());
        let room = |view: &ViewMut<'_>| self.empty(self.activations, view.shape());
        let ExpertScratch { gathered, middle, yielded } = &args.scratch;
        let (mut gathered, mut yielded) = (room(gathered), room(yielded));
        let mut middle = middle.each_ref().map(room);
        self.ops.expert_mlp(ExpertMlpArgs {
            out: out.view_mut(),
            x: x.view(),
            experts: &experts,
            activation: args.activation,
            expert_ids: ids.view(),
            weights: weights.view(),
            scratch: ExpertScratch {
                gathered: gathered.view_mut(),
                middle: middle.each_mut().map(Tensor::view_mut),
                yielded: yielded.view_mut(),
            },
        });
        self.widen(args.out, &out);
    }

    fn gated_activation(&self, args: GatedActivationArgs<'_>) {
        let (gate, up) = (self.narrow(args.gate), self.narrow(args.up));
        let mut out = self.empty(self.activations, args.out.shape());
        let (gate, up, activation) = (gate.view(), up.view(), args.activation);
        self.ops.gated_activation(GatedActivationArgs {
            out: out.view_mut(),
            gate,
            up,
            activation,
        });
        self.widen(args.out, &out);
    }

    fn write_kv(&self, mut args: WriteKvArgs<'_>) {
        let (mut k_cache, mut v_cache) =
            (self.cache(reborrowed(&mut args.k_cache)), self.cache(reborrowed(&mut args.v_cache)));
        let (k, v) = (self.narrow(args.k), self.narrow(args.v));
        let slots = self.copy(args.slot_mapping);
        self.ops.write_kv(WriteKvArgs {
            k_cache: k_cache.view_mut(),
            v_cache: v_cache.view_mut(),
            k: k.view(),
            v: v.view(),
            slot_mapping: slots.view(),
        });
        self.restore(&mut args.k_cache, &k_cache);
        self.restore(&mut args.v_cache, &v_cache);
    }

    fn rope_and_write_kv(&self, mut args: RopeKvArgs<'_>) {
        let (mut k_cache, mut v_cache) =
            (self.cache(reborrowed(&mut args.k_cache)), self.cache(reborrowed(&mut args.v_cache)));
        let RopeArgs { q, k, positions, cos, sin, style } = args.rope;
        let (mut to_q, mut to_k) = (self.narrow(q.as_view()), self.narrow(k.as_view()));
        let (v, slots) = (self.narrow(args.v), self.copy(args.slot_mapping));
        let (positions, cos, sin) = (self.copy(positions), self.copy(cos), self.copy(sin));
        self.ops.rope_and_write_kv(RopeKvArgs {
            rope: RopeArgs {
                q: to_q.view_mut(),
                k: to_k.view_mut(),
                positions: positions.view(),
                cos: cos.view(),
                sin: sin.view(),
                style,
            },
            v: v.view(),
            k_cache: k_cache.view_mut(),
            v_cache: v_cache.view_mut(),
            slot_mapping: slots.view(),
        });
        self.widen(q, &to_q);
        self.widen(k, &to_k);
        self.restore(&mut args.k_cache, &k_cache);
        self.restore(&mut args.v_cache, &v_cache);
    }

    fn attention(&self, args: AttentionArgs<'_>) {
        let q = self.narrow(args.q);
        let (k_cache, v_cache) = (self.cache(args.k_cache), self.cache(args.v_cache));
        let tables = self.copy(args.block_tables);
        let (cu_seqlens, contexts) = (self.copy(args.cu_seqlens_q), self.copy(args.context_lens));
        let sinks = args.sinks.map(|sinks| self.copy(sinks));
        let mut out = self.empty(self.activations, args.out.shape());
        self.ops.attention(AttentionArgs {
            out: out.view_mut(),
            q: q.view(),
            k_cache: k_cache.view(),
            v_cache: v_cache.view(),
            block_tables: tables.view(),
            cu_seqlens_q: cu_seqlens.view(),
            context_lens: contexts.view(),
            sinks: sinks.as_ref().map(Tensor::view),
            ..args
        });
        self.widen(args.out, &out);
    }

    fn head_matmul(&self, args: HeadMatmulArgs<'_>) {
        let (x, weight) = (self.narrow(args.x), args.weight);
        let weight = Tensor::from_slice(&floats(weight), weight.shape());
        let weight = self.ops.place_heads(weight).unwrap();
        let mut out = self.narrow(args.out.as_view());
        let (x, weight) = (x.view(), weight.view());
        self.ops.head_matmul(HeadMatmulArgs { out: out.view_mut(), x, weight });
        self.widen(args.out, &out);
    }

    fn write_latent(&self, mut args: WriteLatentArgs<'_>) {
        let mut cache = self.cache(reborrowed(&mut args.cache));
        let mut absorbed = self.narrow(args.absorbed.as_view());
        let (mut latent, q) = (self.narrow(args.latent.as_view()), self.narrow(args.q));
        let tables = [args.weight, args.positions, args.cos, args.sin, args.slot_mapping];
        let [weight, positions, cos, sin, slots] = tables.map(|table| self.copy(table));
        self.ops.write_latent(WriteLatentArgs {
            cache: cache.view_mut(),
            absorbed: absorbed.view_mut(),
            latent: latent.view_mut(),
            q: q.view(),
            weight: weight.view(),
            eps: args.eps,
            positions: positions.view(),
            cos: cos.view(),
            sin: sin.view(),
            style: args.style,
            slot_mapping: slots.view(),
        });
        self.restore(&mut args.cache, &cache);
        self.widen(args.absorbed, &absorbed);
    }

    fn latent_attention(&self, args: LatentAttentionArgs<'_>) {
        let (q, cache) = (self.narrow(args.q), self.cache(args.cache));
        let steps = [args.block_tables, args.cu_seqlens_q, args.context_lens];
        let [block_tables, cu_seqlens_q, context_lens] = steps.map(|step| self.copy(step));
        let mut out = self.empty(self.activations, args.out.shape());
        self.ops.latent_attention(LatentAttentionArgs {
            out: out.view_mut(),
            q: q.view(),
            cache: cache.view(),
            block_tables: block_tables.view(),
            cu_seqlens_q: cu_seqlens_q.view(),
            context_lens: context_lens.view(),
            scale: args.scale,
        });
        self.widen(args.out, &out);
    }

    fn add(&self, args: AddArgs<'_>) {
        let (mut out, x) = (self.narrow(args.out.as_view()), self.narrow(args.x));
        self.ops.add(AddArgs { out: out.view_mut(), x: x.view() });
        self.widen(args.out, &out);
    }

    fn gather_rows(&self, args: GatherRowsArgs<'_>) {
        let (x, rows) = (self.narrow(args.x), self.copy(args.rows));
        let mut out = self.empty(self.activations, args.out.shape());
        let (x, rows) = (x.view(), rows.view());
        self.ops.gather_rows(GatherRowsArgs { out: out.view_mut(), x, rows });
        self.widen(args.out, &out);
    }

    fn copy_blocks(&self, mut args: CopyBlocksArgs<'_>) {
        let mut k_cache = self.cache(reborrowed(&mut args.k_cache));
        let mut v_cache = args.v_cache.as_mut().map(|cache| self.cache(reborrowed(cache)));
        let pairs = args.pairs;
        let (k, v) = (k_cache.view_mut(), v_cache.as_mut().map(KvTensor::view_mut));
        self.ops.copy_blocks(CopyBlocksArgs { k_cache: k, v_cache: v, pairs });
        self.restore(&mut args.k_cache, &k_cache);
        if let (Some(to), Some(from)) = (&mut args.v_cache, &v_cache) {
            self.restore(to, from);
        }
    }

    fn soft_cap(&self, mut args: SoftCapArgs<'_>) {
        let mut x = self.copy(args.x.as_view());
        self.ops.soft_cap(SoftCapArgs { x: x.view_mut(), cap: args.cap });
        self.check();
        self.restore_bytes(args.x.reborrow(), &x);
    }

    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        let mut logits = self.copy(args.logits.as_view());
        let tokens = self.ops.sample(SampleArgs { logits: logits.view_mut(), rows: args.rows });
        self.check();
        tokens
    }
}

fn floats(view: View<'_>) -> Vec<f32> {
    match view.dtype() {
        DType::F32 => view.as_slice::<f32>().to_vec(),
        DType::BF16 => view.as_slice::<bf16>().iter().map(|x| x.to_f32()).collect(),
        DType::F16 => view.as_slice::<f16>().iter().map(|x| x.to_f32()).collect(),
        other => panic!("floats of {other}"),
    }
}

fn reborrowed<'a>(cache: &'a mut KvViewMut<'_>) -> KvView<'a> {
    KvView { data: cache.data.as_view(), scales: cache.scales.as_ref().map(ViewMut::as_view) }
}
