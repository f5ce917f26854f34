//! Facts about the device that trains: what it is, how much memory it has, how fast it can be.

use std::fmt;
use std::fs;

use candle_core::{DType, Device};

use crate::ops::measured_peak_flops;
use crate::{Error, Result};

/// The environment variable that names the device.
const DEVICE_VARIABLE: &str = "TITAN_DEVICE";

pub const GIB: f64 = (1u64 << 30) as f64;

/// The device that trains, as far as logs and throughput figures need to know it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    pub name: String,
    /// Threads that can run at once; of a GPU, those of its host.
    pub cores: usize,
    /// 0 where the system does not say.
    pub total_memory_bytes: u64,
    /// What 100 % MFU means, in floating-point operations per second.
    pub peak_flops: f64,
    /// The number of a GPU; `None`: the host's processor.
    pub gpu: Option<usize>,
}

impl DeviceFacts {
    /// The host's processor. Takes a tenth of a second or so to measure the peak, in the precision that is faster.
    pub fn cpu() -> Self {
        Self {
            name: cpu_name(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            total_memory_bytes: total_memory_bytes().unwrap_or(0),
            peak_flops: measured_peak_flops(DType::F32).max(measured_peak_flops(DType::BF16)),
            gpu: None,
        }
    }

    /// What this process holds of the device's memory.
    pub fn memory_use(&self) -> MemoryUse {
        #[cfg(feature = "cuda")]
        if let Some(index) = self.gpu {
            return super::gpu::memory_use(index);
        }
        MemoryUse::of_process()
    }
}

/// GPU number `index` of this machine.
///
/// # Errors
/// [`Error::Device`] if this program was built without the `cuda` feature, or the GPU is not there or too old.
pub fn gpu(index: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return super::gpu::open(index);
    #[cfg(not(feature = "cuda"))]
    Err(Error::Device(format!("GPU {index} cannot be used: titan was built without the `cuda` feature")))
}

/// Why `device` cannot multiply matrices of 8-bit floats; `None` if it can.
pub fn lack_of_float8(device: &Device) -> Result<Option<String>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::gpu::lack_of_float8(device),
        _ => Ok(Some("this run is on the CPU".into())),
    }
}

/// The device that computes, and why it is this one.
#[derive(Debug)]
pub struct Choice {
    pub device: Device,
    why: String,
}

impl Choice {
    /// What the environment variable `TITAN_DEVICE` names: "cpu", "cuda" or "cuda:N"; else the first GPU, if there is one
    /// that can be used, else the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] if the variable names no device, [`Error::Device`] if its GPU cannot be used.
    pub fn of_environment() -> Result<Self> {
        let named = std::env::var(DEVICE_VARIABLE).unwrap_or_default();
        let index = match named.as_str() {
            "" => return Ok(Self::of_machine()),
            "cpu" => None,
            "cuda" => Some(0),
            other => Some(other.strip_prefix("cuda:").and_then(|index| index.parse().ok()).ok_or_else(|| {
                Error::Usage(format!(
                    "{DEVICE_VARIABLE} = {other:?} names no device\n   = allowed: \"cpu\", \"cuda\", and \"cuda:1\" for the \
                     second GPU"
                ))
            })?),
        };
        Ok(Self { device: index.map_or(Ok(Device::Cpu), gpu)?, why: format!("as {DEVICE_VARIABLE} says") })
    }

    fn of_machine() -> Self {
        match gpu(0) {
            Ok(device) => Self { device, why: "the first GPU".into() },
            Err(_) if !cfg!(feature = "cuda") => {
                Self { device: Device::Cpu, why: "titan was built without the `cuda` feature".into() }
            }
            Err(error) => Self { device: Device::Cpu, why: error.to_string() },
        }
    }

    /// The device, in few words.
    pub fn name(&self) -> String {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let context = device.cuda_stream().context().clone();
                format!("{} (cuda:{})", context.name().unwrap_or_default(), context.ordinal())
            }
            _ => cpu_name(),
        }
    }

    /// Of a processor, measures the peak.
    pub fn facts(&self) -> Result<DeviceFacts> {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => super::gpu::facts(device.cuda_stream().context().ordinal()),
            _ => Ok(DeviceFacts::cpu()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Waits until `device` has done all that it was given.
pub fn synchronize(device: &Device) -> Result<()> {
    Ok(device.synchronize()?)
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, cores, total_memory_bytes, peak_flops, gpu } = self;
        let memory_gib = *total_memory_bytes as f64 / GIB;
        match gpu {
            Some(index) => write!(f, "{name} (cuda:{index})")?,
            None => write!(f, "{name}, {cores} cores")?,
        }
        write!(f, ", {memory_gib:.1} GiB of memory, peak {:.2} TFLOP/s", peak_flops / 1e12)
    }
}

/// Memory that this process holds, 0 where the system does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    pub current_bytes: u64,
    /// The most since the process began.
    pub peak_bytes: u64,
    /// The most that was held, in use or ready for use. On the host the two are one.
    pub peak_reserved_bytes: u64,
}

impl MemoryUse {
    /// Resident memory of this process.
    pub fn of_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bytes = |key| kib_field(&status, key).unwrap_or(0);
        let peak_bytes = bytes("VmHWM");
        Self { current_bytes: bytes("VmRSS"), peak_bytes, peak_reserved_bytes: peak_bytes }
    }
}

/// Dense tensor-core peaks from NVIDIA's data sheets and architecture white papers, in TFLOP/s: bf16 with f32
/// accumulation, fp16 for V100 and T4, which have no bf16. A name comes before any that it contains.
const GPU_PEAK_TFLOPS: &[(&str, f64)] = &[
    ("A100", 312.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("T4", 65.0),
    ("V100 PCIE", 112.0),
    ("V100", 125.0),
    ("RTX 3050", 18.2),
    ("RTX 3060 Ti", 32.4),
    ("RTX 3060", 25.5),
    ("RTX 3070 Ti", 43.5),
    ("RTX 3070", 40.6),
    ("RTX 3080 Ti", 68.2),
    ("RTX 3080", 59.5),
    ("RTX 3090 Ti", 80.0),
    ("RTX 3090", 71.2),
    ("RTX 4060 Ti", 44.1),
    ("RTX 4060", 30.2),
    ("RTX 4070 Ti SUPER", 88.2),
    ("RTX 4070 Ti", 80.2),
    ("RTX 4070 SUPER", 71.0),
    ("RTX 4070", 58.3),
    ("RTX 4080 SUPER", 104.4),
    ("RTX 4080", 97.5),
    ("RTX 4090", 165.2),
    ("RTX 5060 Ti", 47.4),
    ("RTX 5060", 38.4),
    ("RTX 5070 Ti", 87.9),
    ("RTX 5070", 61.7),
    ("RTX 5080", 112.6),
    ("RTX 5090", 209.5),
];

/// The bf16 peak of a GPU by the name that its driver gives ("NVIDIA A100-SXM4-80GB"), in FLOP/s. `None` for one
/// that the table lacks, and for laptop, Max-Q, D and MIG variants, which are slower than their namesakes: measure those.
pub fn gpu_peak_flops(name: &str) -> Option<f64> {
    let words = |name: &str| name.split([' ', '-']).map(str::to_ascii_lowercase).collect::<Vec<_>>();
    let name = words(name);
    if ["laptop", "max", "d", "mig"].iter().any(|word| name.iter().any(|found| found == word)) {
        return None;
    }
    let names_it = |gpu: &str| {
        let gpu = words(gpu);
        name.windows(gpu.len()).any(|window| window == gpu)
    };
    GPU_PEAK_TFLOPS.iter().find(|(gpu, _)| names_it(gpu)).map(|(_, tflops)| tflops * 1e12)
}

fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| format!("{} CPU", std::env::consts::ARCH), |(_, name)| name.trim().to_owned())
}

/// What this process may use: the machine's memory, or less where its control group says so.
fn total_memory_bytes() -> Option<u64> {
    let machine = kib_field(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")?;
    // "max" without a limit.
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|limit| limit.trim().parse().ok());
    Some(group.map_or(machine, |limit: u64| limit.min(machine)))
}

/// Bytes of a line `key:   123 kB`.
fn kib_field(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_known_by_the_names_their_driver_gives() {
        for (name, tflops) in [
            ("NVIDIA A100-SXM4-40GB", 312.0),
            ("NVIDIA A100 80GB PCIe", 312.0),
            ("NVIDIA H100 80GB HBM3", 989.0),
            ("NVIDIA H100 PCIe", 756.0),
            ("NVIDIA H100 NVL", 835.0),
            ("NVIDIA H200", 989.0),
            ("NVIDIA B200", 2250.0),
            ("NVIDIA L40S", 362.0),
            ("NVIDIA L4", 121.0),
            ("Tesla T4", 65.0),
            ("Tesla V100-SXM2-16GB", 125.0),
            ("Tesla V100-PCIE-16GB", 112.0),
            ("NVIDIA GeForce RTX 3090", 71.2),
            ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
            ("NVIDIA GeForce RTX 5090", 209.5),
        ] {
            assert_eq!(gpu_peak_flops(name), Some(tflops * 1e12), "{name}");
        }
    }

    #[test]
    fn unknown_gpus_and_slower_variants_have_no_peak_in_the_table() {
        for name in [
            "NVIDIA T400 4GB",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
            "Radeon VII",
        ] {
            assert_eq!(gpu_peak_flops(name), None, "{name}");
        }
    }

    #[test]
    fn no_gpu_is_hidden_behind_a_shorter_name() {
        for (name, tflops) in GPU_PEAK_TFLOPS {
            assert_eq!(gpu_peak_flops(name), Some(tflops * 1e12), "{name}");
        }
    }

    #[test]
    fn the_first_gpu_is_chosen_else_the_cpu_and_the_log_says_why() {
        let choice = Choice::of_machine();
        match gpu(0) {
            Ok(_) => assert!(choice.device.is_cuda() && choice.to_string() == "the first GPU"),
            Err(error) => {
                eprintln!("on the CPU: {error}");
                assert!(choice.device.is_cpu() && choice.facts().unwrap().gpu.is_none());
                let why = if cfg!(feature = "cuda") { "GPU 0 cannot be used" } else { "without the `cuda` feature" };
                assert!(choice.to_string().contains(why), "{choice}");
            }
        }
    }

    #[test]
    fn fields_of_proc_files_are_read_in_bytes() {
        let status = "VmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(kib_field(status, "VmRSS"), Some(1 << 20));
        assert_eq!(kib_field(status, "VmSwap"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_holds_memory_and_the_machine_more_of_it() {
        let memory = MemoryUse::of_process();
        assert!(0 < memory.current_bytes && memory.current_bytes <= memory.peak_bytes, "{memory:?}");
        assert!(memory.peak_bytes < total_memory_bytes().unwrap());
    }

    #[test]
    fn the_processor_reaches_a_plausible_peak() {
        let facts = DeviceFacts::cpu();
        assert!((1e8..1e15).contains(&facts.peak_flops), "{facts}");
    }
}
