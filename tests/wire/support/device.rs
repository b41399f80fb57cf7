//! A GPU that computes nothing and breaks: launches succeed and leave zeros, until one fails.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::config::{CacheConfig, KvCacheDtype, SchedulerConfig, SchedulingPolicy};
use tokenmill::device::RankContext;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::cuda::launcher::{CudaError, DeviceFacts, KernelArg, Launch, Launcher};
use tokenmill::ops::{DeviceMemoryInfo, Recording};
use tokenmill::runner::{MemoryDemand, MemoryPlan, ModelRunner};
use tokenmill::tensor::{DType, Shape, Tensor, View, ViewMut};
use tokenmill::weights::Loader;

use super::model::VOCAB_SIZE;

/// The last launch that succeeds, and what went wrong.
pub struct BreakingDevice {
    state: Mutex<(usize, Option<CudaError>)>,
}

/// The host's memory under a tensor of the device.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain bytes, which the borrows of the tensor govern.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout and freed once.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl BreakingDevice {
    /// The launch after this many fails.
    pub fn after(launches: usize) -> BreakingDevice {
        BreakingDevice { state: Mutex::new((launches, None)) }
    }

    /// A runner of a small model on it.
    pub fn runner(self) -> ModelRunner {
        let config = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "torch_dtype": "bfloat16", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
            "head_dim": 64, "vocab_size": {VOCAB_SIZE}, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": true,
            "hidden_act": "silu"}}"#
        );
        let spec = ModelSpec::from_config(&config).expect("the config is supported");
        let cache = CacheConfig {
            memory_bytes: None,
            fraction: 0.4,
            gpu_memory_utilization: 0.9,
            block_size: 16,
            dtype: KvCacheDtype::Auto,
            enable_prefix_caching: true,
        };
        let scheduler = SchedulerConfig {
            max_num_seqs: 8,
            max_num_batched_tokens: 512,
            max_num_queued_requests: 16,
            policy: SchedulingPolicy::Fcfs,
        };
        // It records nothing, so nothing is replayed.
        let rank = RankContext::solo(Arc::new(CudaOps::new(self).eager()));
        let source = DummySource::new(spec.expected_tensors(), spec.dtype);
        let loader = Loader::new(&source).arranged(&*rank.ops);
        let demand = MemoryDemand {
            spec: &spec,
            weights_bytes: loader.size_bytes(&spec.expected_tensors()),
            wanted_len: None,
            cache: &cache,
            scheduler: &scheduler,
        };
        let plan = MemoryPlan::new(&*rank.ops, &demand, 0).expect("it fits");
        let decoder = Decoder::load(&spec, &loader, plan.max_model_len).expect("it fits");
        ModelRunner::new(decoder, &spec, rank.clone(), &plan).expect("it fits")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, (usize, Option<CudaError>)> {
        self.state.lock().expect("nobody panics while holding it")
    }
}

/// The bytes of a tensor of this device.
fn bytes_mut<'a>(view: &'a mut ViewMut<'_>) -> &'a mut [u8] {
    let len_bytes = view.as_view().size_bytes();
    // SAFETY: this device's memory is the host's, and the view borrows it exclusively.
    unsafe { std::slice::from_raw_parts_mut(view.address(), len_bytes) }
}

impl Launcher for BreakingDevice {
    fn name(&self) -> String {
        "0 Breaking GPU".to_owned()
    }

    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            compute_capability: (9, 0),
            multiprocessors: 132,
            shared_bytes_per_block: 227 << 10,
        }
    }

    fn memory(&self) -> Result<DeviceMemoryInfo, CudaError> {
        Ok(DeviceMemoryInfo { free: 1 << 30, total: 1 << 30 })
    }

    fn allocate(&self, dtype: DType, shape: Shape) -> Result<Tensor, CudaError> {
        let len_bytes = shape.len() * dtype.size_bytes();
        let layout = Layout::from_size_align(len_bytes.max(1), 256).expect("it is small");
        // SAFETY: the layout has a size, and the tensor's owner keeps the memory alive for it.
        unsafe {
            let start = NonNull::new(std::alloc::alloc_zeroed(layout)).expect("there is memory");
            Ok(Tensor::on_device(start, dtype, shape, Arc::new(Memory { start, layout })))
        }
    }

    fn clear(&self, mut to: ViewMut<'_>) {
        bytes_mut(&mut to).fill(0);
    }

    fn upload(&self, mut to: ViewMut<'_>, from: &[u8]) {
        bytes_mut(&mut to).copy_from_slice(from);
    }

    fn download(&self, to: &mut [u8], from: View<'_>) {
        // SAFETY: this device's memory is the host's, and the view borrows it.
        let from = unsafe { std::slice::from_raw_parts(from.address(), from.size_bytes()) };
        to.copy_from_slice(from);
    }

    fn copy(&self, _to: ViewMut<'_>, _from: View<'_>) {}

    fn launch(&self, kernel: &'static str, launch: Launch, _args: &[KernelArg<'_>]) {
        let (left, failure) = &mut *self.state();
        match left.checked_sub(1) {
            Some(fewer) => *left = fewer,
            None => {
                let (kernel, reason) = (kernel.to_owned(), "an illegal memory access".to_owned());
                failure.get_or_insert(CudaError::Kernel { kernel, launch, reason });
            }
        }
    }

    fn begin_recording(&self) {}

    fn end_recording(&self) -> Option<Recording> {
        None
    }

    fn replay(&self, _recording: &Recording) {}

    fn synchronize(&self) -> Result<(), CudaError> {
        self.state().1.clone().map_or(Ok(()), Err)
    }
}
