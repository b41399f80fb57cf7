//! The SIMT machine itself: it finds the mistakes that it is there for, and nothing else.

use half::{bf16, f16};
use tokenmill::formats::fp8;
use tokenmill::ops::cuda::launcher::{CudaError, KernelArg, Launch, Launcher};
use tokenmill::tensor::{DType, Shape, Tensor};

use crate::shim::{self, Shim};
use crate::support::Rng;

fn words(shim: &Shim, len: usize) -> Tensor {
    shim.allocate(DType::U32, Shape::from([len])).unwrap()
}

fn read(shim: &Shim, tensor: &Tensor) -> Vec<u32> {
    let mut bytes = vec![0; tensor.size_bytes()];
    shim.download(&mut bytes, tensor.view());
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Sums of 1..=64 by the kernel, with and without one of its barriers.
fn sum(shim: &Shim, forget: i32) -> u32 {
    let (mut out, mut x) = (words(shim, 1), words(shim, 64));
    let values: Vec<u8> = (1..=64u32).flat_map(u32::to_le_bytes).collect();
    shim.upload(x.view_mut(), &values);
    let args = [KernelArg::from(&mut out), KernelArg::from(&x), KernelArg::from(forget)];
    shim.launch("sum_i32", Launch::new(1, 64), &args);
    shim.synchronize().unwrap();
    read(shim, &out)[0]
}

/// What the launch of a kernel that only writes to `out` fails with.
fn failure(kernel: &'static str, threads: usize) -> String {
    let shim = Shim::with_test_kernels();
    let mut out = words(&shim, threads);
    shim.launch(kernel, Launch::new(1, threads), &[KernelArg::from(&mut out)]);
    shim.synchronize().unwrap_err().to_string()
}

#[test]
fn the_machine_runs_kernels_in_random_order_so_that_a_missing_barrier_shows() {
    let sums = |forget| (0..20).map(|_| sum(&Shim::with_test_kernels(), forget)).collect();
    let (sound, broken): (Vec<u32>, Vec<u32>) = (sums(0), sums(1));
    assert_eq!(sound, [2080; 20]);
    assert!(broken.iter().any(|&sum| sum != 2080), "{broken:?}");
}

#[test]
fn the_machine_names_the_barriers_at_which_a_kernel_divides() {
    let words = failure("divergent_barrier", 64);
    assert!(words.contains("threads of a block wait at different barriers"), "{words}");
    assert!(words.contains("kernel divergent_barrier") && words.contains("broken.cu:"), "{words}");
}

#[test]
fn the_machine_says_which_lanes_of_a_kernel_wait_for_ever() {
    let words = failure("lonely_shuffle", 32);
    assert!(words.contains("wait for others that will not come"), "{words}");
    assert!(words.contains("thread 3 at __shfl_xor_sync, "), "{words}");
    assert!(words.contains("thread 4 to 31 at __syncwarp, "), "{words}");
}

#[test]
fn the_machine_lets_kernels_diverge_where_masks_say_so() {
    let shim = Shim::with_test_kernels();
    let mut out = words(&shim, 64);
    shim.launch("sound_divergence", Launch::new(1, 96), &[KernelArg::from(&mut out)]);
    shim.synchronize().unwrap();
    let expected = |i: usize| match i {
        0..16 => 120,
        32..48 => 120 + 16 * 32,
        _ => 4,
    };
    assert_eq!(read(&shim, &out), (0..64).map(expected).collect::<Vec<u32>>());
}

#[test]
fn the_machine_fills_a_kernels_shared_memory_with_nans() {
    let shim = Shim::with_test_kernels();
    let mut out = words(&shim, 64);
    let launch = Launch::new(1, 64).with_shared(256);
    shim.launch("unwritten_shared", launch, &[KernelArg::from(&mut out)]);
    shim.synchronize().unwrap();
    let values: Vec<f32> = read(&shim, &out).into_iter().map(f32::from_bits).collect();
    assert_eq!(values[..32], [3.0; 32]);
    assert!(values[32..].iter().all(|x| x.is_nan()), "{values:?}");
}

#[test]
fn the_machine_notices_when_a_kernel_writes_too_far() {
    let far = |count: i32, to_shared: i32| {
        let shim = Shim::with_test_kernels();
        let mut out = words(&shim, 8);
        let args = [KernelArg::from(&mut out), KernelArg::from(count), KernelArg::from(to_shared)];
        shim.launch("write_far", Launch::new(1, 1).with_shared(32), &args);
        shim.synchronize().map_err(|error| error.to_string())
    };
    if shim::has_sanitizer() {
        return; // It ends the process where these are found.
    }
    assert_eq!((far(8, 0), far(8, 1)), (Ok(()), Ok(())));
    let words = far(9, 0).unwrap_err();
    assert!(words.contains("beyond the ends of 32 bytes of device memory"), "{words}");
    let words = far(9, 1).unwrap_err();
    assert!(words.contains("beyond its 32 bytes of dynamic shared memory"), "{words}");
}

#[test]
fn the_machine_checks_what_a_kernel_is_given() {
    let launch = Launch::new(1, 1);
    let refused = |kernel: &'static str, args: &[KernelArg<'_>]| {
        let shim = Shim::with_test_kernels();
        shim.launch(kernel, launch, args);
        let Err(CudaError::Kernel { reason, .. }) = shim.synchronize() else { panic!("{kernel}") };
        reason
    };
    assert_eq!(refused("no_such_kernel", &[]), "there is no such kernel");
    let number = KernelArg::from(1i32);
    assert_eq!(refused("divergent_barrier", &[number]), "takes arguments p, got i");
    let host = Tensor::zeros(DType::U32, [1]);
    let reason = refused("divergent_barrier", &[KernelArg::from(&host)]);
    assert_eq!(reason, "argument 0 is not in device memory");
}

#[test]
fn the_machine_does_nothing_after_a_kernel_failed() {
    let shim = Shim::with_test_kernels();
    shim.launch("no_such_kernel", Launch::new(1, 1), &[]);
    let mut out = words(&shim, 1);
    let args = [KernelArg::from(&mut out), KernelArg::from(1i32), KernelArg::from(0i32)];
    shim.launch("write_far", Launch::new(1, 1), &args);
    assert_eq!(read(&shim, &out), [u32::MAX], "memory is still poisoned");
    assert!(shim.synchronize().unwrap_err().to_string().contains("no_such_kernel"));
}

/// All values of 16 bits, everything around the ends of the formats, and random bits.
fn numbers() -> Vec<f32> {
    let mut numbers: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect();
    numbers.extend((0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()));
    for x in [448.0f32, 464.0, 480.0, 65504.0, 65519.99, 65520.0, f32::MAX, 2f32.powi(-14)] {
        numbers.extend([x, -x, x.next_up(), x.next_down()]);
    }
    // Ties between values of FP8, bf16 and f16.
    numbers.extend((0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16 | 0x8000)));
    numbers.extend((0..1 << 19).map(|bits| f32::from_bits(0x3300_0000 + (bits << 12))));
    let rng = &mut Rng::new(3);
    numbers.extend((0..100_000).map(|_| f32::from_bits(rng.below(1 << 32) as u32)));
    numbers.retain(|x| !x.is_nan());
    numbers.truncate(numbers.len() / 4 * 4);
    numbers
}

#[test]
fn conversions_of_kernels_have_the_hosts_bits() {
    let numbers = numbers();
    let check = |kernel: &'static str, bits_of: &dyn Fn(f32) -> u32, back: &dyn Fn(u32) -> f32| {
        let shim = Shim::with_test_kernels();
        let len = numbers.len();
        let (mut x, mut out, mut bits) = (words(&shim, len), words(&shim, len), words(&shim, len));
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        shim.upload(x.view_mut(), &bytes);
        let tensors = [KernelArg::from(&mut out), KernelArg::from(&mut bits), KernelArg::from(&x)];
        let args = [&tensors[..], &[KernelArg::from(len)]].concat();
        shim.launch(kernel, Launch::new(len.div_ceil(256), 256), &args);
        shim.synchronize().unwrap();
        for ((x, got), out) in numbers.iter().zip(read(&shim, &bits)).zip(read(&shim, &out)) {
            assert_eq!(got, bits_of(*x), "{kernel} of {x} ({:08x})", x.to_bits());
            assert_eq!(out, back(got).to_bits(), "{kernel} back from {got:x}");
        }
    };
    let bf16_back = |bits: u32| bf16::from_bits(bits as u16).to_f32();
    check("convert_bf16", &|x| u32::from(bf16::from_f32(x).to_bits()), &bf16_back);
    let f16_back = |bits: u32| f16::from_bits(bits as u16).to_f32();
    check("convert_f16", &|x| u32::from(f16::from_f32(x).to_bits()), &f16_back);
    check("convert_fp8", &|x| u32::from(fp8::encode(x)), &|bits| fp8::decode(bits as u8));
}
