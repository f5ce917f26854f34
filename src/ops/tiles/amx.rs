use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

use half::bf16;

use super::{Block, Consumer, Left, PAIRS, Square, TILE, TILE_LEN};

/// Whether the processor has bf16 tiles and the system lets this process use them.
pub fn is_usable() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let features = __cpuid_count(7, 0).edx;
    features & AMX_BF16 != 0 && features & AMX_TILE != 0 && request_permission()
}

/// Linux gives the registers' eight kibibytes only to processes that ask.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call reads two integers and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// Layout of the tile registers, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tile registers, in use.
pub struct Tiles(());

impl Tiles {
    /// Eight tiles of 16 rows of 64 bytes.
    pub fn configure() -> Self {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
        config.bytes_per_row[..8].fill(64);
        config.rows[..8].fill(TILE as u8);
        // SAFETY: reads the 64 bytes of `config`. The only caller has seen `is_usable`.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: forgets the registers, which nothing uses outside of `Tiles`.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// # Safety
/// `Tiles` are configured; the 16 rows of 64 bytes, `stride` bytes apart, can be read.
#[inline(always)]
unsafe fn load<const T: u8>(from: *const u8, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
            options(nostack, readonly, preserves_flags));
    }
}

/// # Safety
/// As for [`load`], to be written.
#[inline(always)]
unsafe fn store<const T: u8>(to: *mut f32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) stride,
            options(nostack, preserves_flags));
    }
}

/// # Safety
/// `Tiles` are configured.
#[inline(always)]
unsafe fn zero<const T: u8>() {
    // SAFETY: promised by the caller.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) };
}

/// `C += A B`.
///
/// # Safety
/// `Tiles` are configured.
#[inline(always)]
unsafe fn multiply<const C: u8, const A: u8, const B: u8>() {
    // SAFETY: promised by the caller.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, nomem, preserves_flags));
    }
}

/// # Safety
/// As for [`super::Isa::block`].
#[inline]
pub unsafe fn block(block: Block<bf16>) {
    // SAFETY: promised by the caller.
    unsafe {
        match (block.n, block.steps) {
            (2, _) if block.parts == 3 => rows::<2, false>(block),
            (_, _) if block.parts == 3 => rows::<1, false>(block),
            (2, 1) => rows::<2, true>(block),
            (2, _) => rows::<2, false>(block),
            (_, 1) => rows::<1, true>(block),
            _ => rows::<1, false>(block),
        }
    }
}

/// All rows of tiles, in pairs. With `ONE` step, the right operand's tiles stay in their registers.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
unsafe fn rows<const N: usize, const ONE: bool>(block: Block<bf16>) {
    // SAFETY: promised by the caller: these are rows of the block.
    unsafe {
        if ONE {
            load_right::<N>(block.b, block.b_stride);
        }
        for i in (0..block.m).step_by(2) {
            let a = Left { data: block.a.data.add(i * block.a.tile), ..block.a };
            let pair = Block { a, c: block.c.add(i * TILE * block.c_stride), ..block };
            if i + 1 < block.m { tiles::<2, N, ONE>(pair) } else { tiles::<1, N, ONE>(pair) }
        }
    }
}

/// # Safety
/// `Tiles` are configured; `b` points to `N` tiles, `stride` numbers apart.
#[inline(always)]
unsafe fn load_right<const N: usize>(b: *const bf16, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        load::<6>(b.cast(), 64);
        if N == 2 {
            load::<7>(b.add(stride).cast(), 64);
        }
    }
}

/// # Safety
/// `Tiles` are configured; `rows` points to a tile of `a`, with another below it if `M` is 2.
#[inline(always)]
unsafe fn load_left<const M: usize>(rows: *const bf16, a: Left<bf16>) {
    let stride = a.row * size_of::<bf16>();
    // SAFETY: promised by the caller.
    unsafe {
        load::<4>(rows.cast(), stride);
        if M == 2 {
            load::<5>(rows.add(a.tile).cast(), stride);
        }
    }
}

/// # Safety
/// `Tiles` are configured.
#[inline(always)]
unsafe fn multiply_all<const M: usize, const N: usize>() {
    // SAFETY: promised by the caller.
    unsafe {
        multiply::<0, 4, 6>();
        if N == 2 {
            multiply::<1, 4, 7>();
        }
        if M == 2 {
            multiply::<2, 5, 6>();
        }
        if M == 2 && N == 2 {
            multiply::<3, 5, 7>();
        }
    }
}

/// Adds the product of two steps: of tiles at `rows` and below them with those at `b` and beside them.
///
/// # Safety
/// `Tiles` are configured; the pointers are good for `parts` tiles each.
#[inline(always)]
unsafe fn add_step<const M: usize, const N: usize>(
    rows: *const bf16,
    a: Left<bf16>,
    b: *const bf16,
    b_stride: usize,
    parts: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        load_left::<M>(rows, a);
        if parts == 1 {
            load_right::<N>(b, b_stride);
            multiply_all::<M, N>();
            return;
        }
        // Of nine products of parts, the six that an f32 sum can feel.
        for part in 0..3 {
            load_right::<N>(b.add(part * TILE_LEN), b_stride);
            multiply_all::<M, N>();
        }
        load_left::<M>(rows.add(TILE_LEN), a);
        for part in [1, 0] {
            load_right::<N>(b.add(part * TILE_LEN), b_stride);
            multiply_all::<M, N>();
        }
        load_left::<M>(rows.add(2 * TILE_LEN), a);
        multiply_all::<M, N>();
    }
}

/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn tiles<const M: usize, const N: usize, const ONE: bool>(block: Block<bf16>) {
    let Block { a, b, b_stride, b_step, steps, parts, c, c_stride, add, .. } = block;
    let row = c_stride * size_of::<f32>();
    // SAFETY: promised by the caller.
    unsafe {
        let below = c.add(TILE * c_stride);
        if add {
            load::<0>(c.cast(), row);
            if N == 2 {
                load::<1>(c.add(TILE).cast(), row);
            }
            if M == 2 {
                load::<2>(below.cast(), row);
            }
            if M == 2 && N == 2 {
                load::<3>(below.add(TILE).cast(), row);
            }
        } else {
            zero::<0>();
            if N == 2 {
                zero::<1>();
            }
            if M == 2 {
                zero::<2>();
            }
            if M == 2 && N == 2 {
                zero::<3>();
            }
        }
        for step in 0..if ONE { 1 } else { steps } {
            let (rows, b) = (a.data.add(step * a.step), b.add(step * b_step));
            if ONE && parts == 1 {
                load_left::<M>(rows, a);
                multiply_all::<M, N>();
            } else {
                add_step::<M, N>(rows, a, b, b_stride, parts);
            }
        }
        store::<0>(c, row);
        if N == 2 {
            store::<1>(c.add(TILE), row);
        }
        if M == 2 {
            store::<2>(below, row);
        }
        if M == 2 && N == 2 {
            store::<3>(below.add(TILE), row);
        }
    }
}

/// As [`super::multiply_each`], for a block of two by two tiles. Tile and vector instructions share few of the processor's
/// units: with the consumer's between those of the product, which take most of their time, it costs almost nothing.
///
/// # Safety
/// As for [`super::Isa::block`]; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub unsafe fn square<C: Consumer>(block: Block<bf16>, last: Option<Square>, consumer: &mut C) {
    let Block { a, b, b_stride, b_step, steps, parts, c, c_stride, .. } = block;
    let row = c_stride * size_of::<f32>();
    let mut pair = 0;
    // SAFETY: promised by the caller.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
        for step in 0..steps {
            add_step::<2, 2>(a.data.add(step * a.step), a, b.add(step * b_step), b_stride, parts);
            if let Some(last) = last {
                let end = (step + 1) * PAIRS / steps;
                while pair < end {
                    consumer.rows(last, pair);
                    pair += 1;
                }
            }
        }
        let below = c.add(TILE * c_stride);
        store::<0>(c, row);
        store::<1>(c.add(TILE), row);
        store::<2>(below, row);
        store::<3>(below.add(TILE), row);
    }
}
