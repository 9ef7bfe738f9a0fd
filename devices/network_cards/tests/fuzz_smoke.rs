//! The fuzz target of the user-mode network on seeded random input.

#[path = "../../../fuzz/src/input.rs"]
#[allow(unreachable_pub, dead_code)]
mod input;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;
#[path = "../../../fuzz/src/user_network.rs"]
#[allow(unreachable_pub)]
mod user_network;

use std::time::Duration;

#[test]
fn the_user_mode_network_bears_any_conversation() {
    let (size, at_most) = ((300, 4000), Duration::from_secs(4));
    smoke::smoke("network", user_network::conversation, &[], size, at_most);
}
