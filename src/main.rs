use std::process::ExitCode;

use titan::tools::memory::Counted;

/// Large tensors otherwise pay for fresh pages from the system on every op.
#[global_allocator]
static ALLOCATOR: Counted<mimalloc::MiMalloc, 4096> = Counted(mimalloc::MiMalloc);

fn main() -> ExitCode {
    titan::tools::bugs::explain_panics();
    titan::tools::memory::keep_freed_pages();
    titan::cli::main(std::env::args_os())
}
