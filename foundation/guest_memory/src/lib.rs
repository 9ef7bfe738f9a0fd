//! Guest-physical memory: RAM regions, dirty tracking, code-page tracking.
