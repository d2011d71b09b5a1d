//! The GPU behind safe calls: memory that grows, copies, and the launches of our own kernels.
#![expect(unsafe_code, reason = "launches code on another processor, which reads raw addresses")]

use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, CUfunction_attribute};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    DriverError, LaunchConfig, PinnedHostSlice, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::CudaError;
use super::params::{Job, Pair, Params, Scalars};

// SAFETY: plain numbers without padding, laid out as the device's twin of the struct.
unsafe impl DeviceRepr for Params {}
// SAFETY: as for `Params`.
unsafe impl DeviceRepr for Job {}
// SAFETY: as for `Params`.
unsafe impl DeviceRepr for Pair {}
// SAFETY: as for `Params`.
unsafe impl DeviceRepr for Scalars {}

/// Whether NVIDIA's driver is on this machine.
pub(super) fn driver_is_present() -> bool {
    // SAFETY: tries to open the library, nothing more.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Whether the run-time compiler is on this machine.
pub(super) fn compiler_is_present() -> bool {
    // SAFETY: tries to open the library, nothing more.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// A GPU and a stream on it.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

/// Memory of the GPU that only ever grows.
#[derive(Debug)]
pub(super) struct Memory<T> {
    what: &'static str,
    slice: Option<CudaSlice<T>>,
}

/// Memory of the host that the GPU copies from and to.
#[derive(Debug)]
pub(super) struct Pinned {
    slice: Option<PinnedHostSlice<u8>>,
}

/// A launch of `blocks` of `threads`, each block with `shared` bytes of shared memory. Blocks that wait
/// for one another must be `resident`: all run at once, or the launch fails.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: usize,
    pub(super) threads: u32,
    pub(super) shared: u32,
    pub(super) resident: bool,
}

impl Gpu {
    /// Loads machine code on GPU `ordinal`.
    pub(super) fn new(context: Arc<CudaContext>, cubin: Vec<u8>) -> Result<Self, CudaError> {
        let failed = |call| move |error| CudaError::Driver { call, error };
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let module = context.load_module(Ptx::from_binary(cubin));
        Ok(Self { stream, module: module.map_err(failed("cuModuleLoadData"))?, context })
    }

    pub(super) fn kernel(&self, name: &'static str) -> Result<CudaFunction, CudaError> {
        self.module.load_function(name).map_err(|error| CudaError::Driver { call: name, error })
    }

    /// A kernel that takes more shared memory than the usual 48 KiB.
    pub(super) fn large_kernel(
        &self,
        name: &'static str,
        shared: u32,
    ) -> Result<CudaFunction, CudaError> {
        let kernel = self.kernel(name)?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let set = kernel.set_attribute(attribute, shared as i32);
        set.map_err(|error| CudaError::Driver { call: name, error })?;
        Ok(kernel)
    }

    /// Multiprocessors of the GPU.
    pub(super) fn multiprocessors(&self) -> Result<usize, CudaError> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.context.attribute(attribute);
        let failed = |error| CudaError::Driver { call: "cuDeviceGetAttribute", error };
        Ok(count.map_err(failed)? as usize)
    }

    /// Microseconds that what `start` starts takes on the GPU.
    pub(super) fn time(
        &self,
        start: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<f64, DriverError> {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let [begin, end] = [self.context.new_event(flags)?, self.context.new_event(flags)?];
        begin.record(&self.stream)?;
        start()?;
        end.record(&self.stream)?;
        Ok(f64::from(begin.elapsed_ms(&end)?) * 1e3)
    }

    /// Copies `from` to every part of `to` that is as long.
    pub(super) fn repeat(
        &self,
        from: &Memory<u8>,
        length: usize,
        to: &mut Memory<u8>,
    ) -> Result<(), CudaError> {
        let failed = |error| CudaError::Driver { call: "weights", error };
        let (Some(from), Some(to)) = (&from.slice, &mut to.slice) else { return Ok(()) };
        for part in 0..to.len() / length {
            let mut part = to.slice_mut(part * length..(part + 1) * length);
            self.stream.memcpy_dtod(&from.slice(..length), &mut part).map_err(failed)?;
        }
        Ok(())
    }

    /// Starts a kernel; an empty grid starts nothing.
    pub(super) fn launch(
        &self,
        kernel: &CudaFunction,
        grid: Grid,
        params: &Params,
    ) -> Result<(), DriverError> {
        if grid.blocks == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (grid.blocks as u32, 1, 1),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes: grid.shared,
        };
        let mut launch = self.stream.launch_builder(kernel);
        launch.arg(params);
        let launched = if grid.resident {
            // SAFETY: all kernels take one `Params`, whose addresses are memory of this GPU that the
            // device keeps and that is as large as the numbers beside them say.
            unsafe { launch.launch_cooperative(config) }
        } else {
            // SAFETY: as above.
            unsafe { launch.launch(config) }
        };
        launched.map(|_| ())
    }

    /// Waits for everything that was started.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        self.stream.synchronize()
    }

    /// Copies to the GPU.
    pub(super) fn upload<T: DeviceRepr>(
        &self,
        from: &[T],
        to: &mut Memory<T>,
    ) -> Result<u64, CudaError> {
        self.grow(to, from.len())?;
        let Some(slice) = &mut to.slice else { return Ok(0) };
        self.stream
            .memcpy_htod(from, slice)
            .map_err(|error| CudaError::Driver { call: to.what, error })?;
        Ok(self.address(to))
    }

    /// Memory for `length` elements, whatever was in it before.
    pub(super) fn grow<T: DeviceRepr>(
        &self,
        memory: &mut Memory<T>,
        length: usize,
    ) -> Result<u64, CudaError> {
        if memory.slice.as_ref().is_none_or(|slice| slice.len() < length) && length > 0 {
            // What was started may still use what is there.
            let failed = |error| CudaError::Driver { call: memory.what, error };
            self.wait().map_err(failed)?;
            memory.slice = None;
            // SAFETY: plain numbers: any bits are values, and each is written before it is read.
            let slice = unsafe { self.stream.alloc(length.next_power_of_two()) };
            memory.slice = Some(slice.map_err(|error| CudaError::Memory {
                what: memory.what,
                bytes: length * size_of::<T>(),
                error,
            })?);
        }
        Ok(self.address(memory))
    }

    /// Where memory is.
    pub(super) fn address<T>(&self, memory: &Memory<T>) -> u64 {
        memory.slice.as_ref().map_or(0, |slice| slice.device_ptr(&self.stream).0)
    }

    /// Pinned memory of at least `bytes`.
    pub(super) fn pin<'a>(
        &self,
        pinned: &'a mut Pinned,
        bytes: usize,
    ) -> Result<&'a mut [u8], CudaError> {
        if pinned.slice.as_ref().is_none_or(|slice| slice.len() < bytes) {
            // SAFETY: bytes: any are values, and each is written before it is read.
            let slice = unsafe { self.context.alloc_pinned(bytes.max(1).next_power_of_two()) };
            let failed = |error| CudaError::Memory { what: "pinned memory", bytes, error };
            pinned.slice = Some(slice.map_err(failed)?);
        }
        let failed = |error| CudaError::Driver { call: "pinned memory", error };
        match &mut pinned.slice {
            Some(slice) => Ok(&mut slice.as_mut_slice().map_err(failed)?[..bytes]),
            None => Ok(&mut []),
        }
    }

    /// Copies the first bytes of pinned memory to the GPU.
    pub(super) fn send(
        &self,
        from: &Pinned,
        bytes: usize,
        to: &mut Memory<u8>,
    ) -> Result<u64, CudaError> {
        self.grow(to, bytes)?;
        if let (Some(from), Some(to)) = (&from.slice, &mut to.slice) {
            let from =
                &from.as_slice().map_err(|e| CudaError::Driver { call: "input", error: e })?;
            let copied = self.stream.memcpy_htod(&from[..bytes], &mut to.slice_mut(..bytes));
            copied.map_err(|error| CudaError::Driver { call: "input", error })?;
        }
        Ok(self.address(to))
    }

    /// Copies from the GPU into the first bytes of pinned memory, and waits.
    pub(super) fn fetch(
        &self,
        from: &Memory<u8>,
        bytes: usize,
        to: &mut Pinned,
    ) -> Result<(), CudaError> {
        let failed = |error| CudaError::Driver { call: "output", error };
        self.pin(to, bytes)?;
        if let (Some(from), Some(to)) = (&from.slice, &mut to.slice) {
            let to = &mut to.as_mut_slice().map_err(failed)?[..bytes];
            self.stream.memcpy_dtoh(&from.slice(..bytes), to).map_err(failed)?;
        }
        self.wait().map_err(failed)
    }
}

impl<T> Memory<T> {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, slice: None }
    }
}

impl Pinned {
    pub(super) fn new() -> Self {
        Self { slice: None }
    }
}
