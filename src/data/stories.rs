//! Simple English stories.
