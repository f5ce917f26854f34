//! The job config: one struct per TOML section, loaded from defaults < TOML < flags, checked as a whole.
