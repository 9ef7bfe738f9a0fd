//! Boards, firmware tables, loaders, the run loop.
