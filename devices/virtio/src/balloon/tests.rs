use std::sync::mpsc;

use super::*;
use crate::spec::feature as ring;
use crate::testing::{DATA, Guest, PATIENCE, RAM};

fn balloon() -> (Guest, BalloonHandle, GuestClock) {
    let clock = GuestClock::new();
    let options = BalloonOptions {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let (balloon, handle) = Balloon::new(options, &clock).unwrap();
    (Guest::new(balloon), handle, clock)
}

const LIST: u64 = DATA;
const PAGES: u64 = DATA + 0x10_0000;

impl Guest {
    fn balloon(&mut self, queue: u16, pages: &[u64]) {
        let bytes: Vec<u8> = pages
            .iter()
            .flat_map(|p| ((p / PAGE) as u32).to_le_bytes())
            .collect();
        self.put(LIST, &bytes);
        self.request(queue, &[(LIST, bytes.len() as u32, false)]);
    }

    fn fill(&mut self, pages: u64) {
        self.put(PAGES, &vec![7; (pages * PAGE) as usize]);
    }

    fn survivors(&self, pages: u64) -> Vec<u64> {
        (0..pages)
            .filter(|n| self.bytes(PAGES + n * PAGE, 1) == [7])
            .collect()
    }
}

#[test]
fn pages_in_the_balloon_are_given_back() {
    let (mut guest, handle, _clock) = balloon();
    guest.start(ring::EVENT_IDX, 16);
    guest.fill(12);
    let page = |n: u64| PAGES + n * PAGE;
    // Rising, falling, alone, past the end of memory, twice.
    let list = [1, 2, 3, 8, 7, 6, 10, 10].map(page);
    guest.balloon(0, &list);
    assert_eq!(guest.survivors(12), [0, 4, 5, 9, 11]);
    guest.balloon(0, &[RAM, RAM + PAGE, u64::from(u32::MAX) * PAGE, page(0)]);
    guest.balloon(0, &[RAM - PAGE, RAM, page(4)]);
    assert_eq!(guest.survivors(12), [5, 9, 11]);
    guest.balloon(1, &list);
    let (send, changed) = mpsc::channel();
    handle.on_change(move |bytes| send.send(bytes).unwrap());
    handle.set_target(20 * PAGE + 5);
    assert_eq!(guest.config_u32(config::NUM_PAGES), 20);
    assert_eq!(guest.interrupts.count(5), 1);
    guest.write(0x2000 + config::ACTUAL, 4, 12);
    assert_eq!(changed.recv_timeout(PATIENCE), Ok(12 * PAGE));
    assert_eq!(handle.actual(), 12 * PAGE);
    guest.start(0, 16);
    assert_eq!(handle.actual(), 0);
}

#[test]
fn statistics_are_asked_for_in_guest_time() {
    let (mut guest, handle, clock) = balloon();
    guest.start(feature::STATS_VQ, 16);
    let mut report = Vec::new();
    for (tag, value) in [(4u16, 1u64 << 20), (5, 1 << 24)] {
        report.extend(tag.to_le_bytes());
        report.extend(value.to_le_bytes());
    }
    report.extend([1, 2, 3]);
    guest.put(LIST, &report);
    guest.send(2, &[(LIST, report.len() as u32, false)]);
    handle.poll_statistics(1_000_000);
    guest.wait(|_| (handle.statistics().values.len() == 2).then_some(()));
    assert_eq!(handle.statistics().values, [(4, 1 << 20), (5, 1 << 24)]);
    assert_eq!(guest.queue(2).used(), None);
    clock.resume();
    assert_eq!(guest.used(2), (0, 0));
    report[2] = 0xff;
    guest.put(LIST, &report);
    guest.send(2, &[(LIST, report.len() as u32, false)]);
    assert_eq!(guest.used(2), (1, 0));
    let now = handle.statistics();
    assert_eq!(now.values[0], (4, (1 << 20) + 0xff));
    assert!(now.updated > 0);
    handle.poll_statistics(0);
    guest.send(2, &[(LIST, 10, false)]);
    guest.send(2, &[(LIST, 10, false)]);
    guest.wait_for_failure();
}

#[test]
fn reported_pages_are_given_back_unless_they_are_poisoned() {
    // Linux numbers the queues by the negotiated features, the specification by all.
    for (features, index) in [
        (feature::PAGE_REPORTING, 2),
        (feature::PAGE_REPORTING | feature::STATS_VQ, 3),
        (feature::PAGE_REPORTING | feature::STATS_VQ, 4),
    ] {
        let (mut guest, _handle, _clock) = balloon();
        guest.start(features | feature::PAGE_POISON, 16);
        guest.fill(8);
        let pieces = [
            (PAGES + PAGE, 2 * PAGE as u32, true),
            (PAGES + 5 * PAGE, PAGE as u32, true),
        ];
        guest.request(index, &pieces);
        assert_eq!(guest.survivors(8), [0, 3, 4, 6, 7]);
        guest.write(0x2000 + config::POISON, 4, 0xaaaa_aaaa);
        guest.request(index, &[(PAGES, 8 * PAGE as u32, true)]);
        assert_eq!(guest.survivors(8), [0, 3, 4, 6, 7]);
    }
}

#[test]
fn requests_without_end_stop_the_queue() {
    let (mut guest, _handle, _clock) = balloon();
    guest.start(0, 16);
    guest.send(0, &[(0, 512 << 10, false)]);
    guest.wait_for_failure();
}
