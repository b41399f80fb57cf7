//! GPUs: found, described, opened, and their memory.
//!
//! The driver's library is opened when the first question is asked. Where there is none, every
//! question has an answer that says so.

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::super::launcher::DeviceFacts;
use super::unavailable::{OLDEST_CAPABILITY, OLDEST_CUDA, Unavailable, Version};
use crate::ops::DeviceMemoryInfo;

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number.
    pub ordinal: usize,
    /// Its name, for example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// What launch code must know.
    pub facts: DeviceFacts,
}

/// What the driver says of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The newest CUDA that it supports, as `1000 · major + 10 · minor`.
    pub cuda_version: u32,
    /// All GPUs.
    pub gpus: Vec<Gpu>,
}

impl Survey {
    /// Asks the driver.
    pub fn take() -> Result<Survey, Unavailable> {
        // SAFETY: opens a library of the system's, as any program that uses a GPU does.
        if !unsafe { sys::is_culib_present() } {
            return Err(Unavailable::NoDriver);
        }
        let mut version = 0;
        // SAFETY: writes one integer, and may be called before anything else.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(refused("asking the NVIDIA driver for its version"))?;
        let cuda_version = version.unsigned_abs();
        match result::init() {
            Ok(()) => {}
            // What a driver answers where it finds nothing, instead of counting 0 later.
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Ok(Survey { cuda_version, gpus: Vec::new() });
            }
            Err(error) => return Err(refused("starting the NVIDIA driver")(error)),
        }
        let count = result::device::get_count().map_err(refused("counting GPUs"))?;
        let gpus = (0..count.unsigned_abs() as usize).map(describe).collect::<Result<_, _>>();
        Ok(Survey { cuda_version, gpus: gpus.map_err(refused("describing a GPU"))? })
    }

    /// The newest CUDA that the driver supports, as people write it.
    pub fn version(&self) -> String {
        Version(self.cuda_version).to_string()
    }

    /// The GPU of this number, when the driver and it are new enough.
    pub fn usable(&self, ordinal: usize) -> Result<&Gpu, Unavailable> {
        if self.cuda_version < OLDEST_CUDA {
            return Err(Unavailable::OldDriver { found: self.cuda_version });
        }
        let count = self.gpus.len();
        let Some(gpu) = self.gpus.get(ordinal) else {
            let missing = Unavailable::NoSuchDevice { ordinal, count };
            return Err(if count == 0 { Unavailable::NoDevice } else { missing });
        };
        let found = gpu.facts.compute_capability;
        if found < OLDEST_CAPABILITY {
            return Err(Unavailable::OldDevice { name: gpu.name.clone(), found });
        }
        Ok(gpu)
    }
}

fn describe(ordinal: usize) -> Result<Gpu, DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: the driver has just named the device.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    let count = |which| attribute(which).map(i32::unsigned_abs);
    Ok(Gpu {
        ordinal,
        name: result::device::get_name(device)?,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
        facts: DeviceFacts {
            compute_capability: (
                count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes_per_block: count(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
        },
    })
}

/// The driver's words for an error.
pub(super) fn words(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, _>| {
        found.map_or_else(|_| "an unknown error".to_owned(), |c| c.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

/// Makes a reason of a refusal.
pub(super) fn refused(what: &'static str) -> impl Fn(DriverError) -> Unavailable {
    move |error| Unavailable::Refused { what, reason: words(error) }
}

/// A GPU's context, the one that all of this process shares.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens a GPU that the driver has named.
    pub fn open(ordinal: usize) -> Result<Context, DriverError> {
        let device = result::device::get(ordinal as i32)?;
        // SAFETY: the driver has just named the device; released once, in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }?;
        Ok(Context { device, context })
    }

    /// Makes this thread's calls of the driver concern this GPU.
    pub fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// Free and total memory.
    pub fn memory(&self) -> Result<DeviceMemoryInfo, DriverError> {
        self.enter()?;
        let (free, total) = result::mem_get_info()?;
        Ok(DeviceMemoryInfo { free: free as u64, total: total as u64 })
    }

    /// New memory, aligned to 256 bytes, whose bytes are not set.
    pub fn allocate(self: &Arc<Context>, bytes: usize) -> Result<DeviceMemory, DriverError> {
        self.enter()?;
        // SAFETY: the memory is freed once, in `drop`.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }?;
        Ok(DeviceMemory { address, bytes, context: Arc::clone(self) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // An error here would come too late for anyone to act on it.
        // SAFETY: retained once in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Memory of a GPU.
pub(super) struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<Context>,
}

impl DeviceMemory {
    /// How much was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first byte, as a pointer that the host must not follow.
    pub fn address(&self) -> NonNull<u8> {
        let address = std::ptr::with_exposed_provenance_mut(self.address as usize);
        NonNull::new(address).expect("the driver gives no memory at address 0")
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // An error here would come too late for anyone to act on it.
            // SAFETY: allocated in `allocate` and freed once; the driver waits for its users.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(compute_capability: (u32, u32)) -> Gpu {
        let facts = DeviceFacts {
            compute_capability,
            multiprocessors: 108,
            shared_bytes_per_block: 163 << 10,
        };
        Gpu { ordinal: 0, name: "A100".to_owned(), memory_bytes: 80 << 30, facts }
    }

    #[test]
    fn a_gpu_is_usable_when_driver_and_gpu_are_new_enough() {
        let survey = |cuda_version, gpus: &[Gpu]| Survey { cuda_version, gpus: gpus.to_vec() };
        let new = survey(13_000, &[gpu((8, 0)), gpu((7, 5))]);
        assert_eq!(new.usable(0), Ok(&gpu((8, 0))));
        let old = Unavailable::OldDevice { name: "A100".to_owned(), found: (7, 5) };
        assert_eq!(new.usable(1), Err(old));
        assert_eq!(new.usable(2), Err(Unavailable::NoSuchDevice { ordinal: 2, count: 2 }));
        assert_eq!(survey(13_010, &[]).usable(0), Err(Unavailable::NoDevice));
        let old = Err(Unavailable::OldDriver { found: 12_090 });
        assert_eq!(survey(12_090, &[gpu((9, 0))]).usable(0), old);
    }
}
