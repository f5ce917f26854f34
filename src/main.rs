use std::process::ExitCode;

/// Large tensors otherwise pay for fresh pages from the system on every op.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    titan::tools::bugs::explain_panics();
    titan::tools::memory::keep_freed_pages();
    titan::cli::main(std::env::args_os())
}
