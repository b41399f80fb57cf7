//! The kernels as nvcc made them.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The kernels of one file under `kernels/`, for every GPU that is supported; compressed.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Name of the file without its extension.
    pub name: &'static str,
    /// A fatbin, which the driver loads as a module.
    pub fatbin: &'static [u8],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_what_drivers_load() {
        for Image { name, fatbin } in KERNELS {
            // The magic number of fatbinary.h.
            assert_eq!(fatbin.first_chunk(), Some(&0xba55_ed50u32.to_le_bytes()), "{name}");
            assert_eq!(fatbin.as_ptr().align_offset(64), 0, "{name}");
        }
    }
}
