use pulp::{Arch, Simd, WithSimd};

/// Number of parallel sums: enough to hide the latency of a multiply-add, few enough for the registers.
const SUMS: usize = 12;

/// Runs multiply-adds in registers, `rounds` times 12 vectors, and returns the number of floating-point operations. This measures
/// the peak of the machine.
pub fn multiply_adds(rounds: usize) -> f64 {
    Arch::new().dispatch(MultiplyAdds { rounds })
}

/// Returns the name of the instruction set that the kernels use here, and the number of lanes of a vector.
pub fn instruction_set() -> (&'static str, usize) {
    Arch::new().dispatch(InstructionSet)
}

struct MultiplyAdds {
    rounds: usize,
}

impl WithSimd for MultiplyAdds {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let factor = simd.splat_f32s(std::hint::black_box(0.5));
        let mut sums = [simd.splat_f32s(std::hint::black_box(1.0)); SUMS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, factor);
            }
        }
        std::hint::black_box(sums);
        (2 * self.rounds * SUMS * S::F32_LANES) as f64
    }
}

struct InstructionSet;

impl WithSimd for InstructionSet {
    type Output = (&'static str, usize);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (&'static str, usize) {
        let name = match S::F32_LANES {
            16 => "AVX-512",
            8 => "AVX2",
            4 => "128-bit vectors",
            _ => "no vectors",
        };
        (name, S::F32_LANES)
    }
}
