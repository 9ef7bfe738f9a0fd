//! The executor with both of its engines.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use block::executor::{self, EngineKind, EventSource, IoThread, spawn_local, yield_now};
use block::sync::WaitQueue;
use rustix::event::{EventfdFlags, eventfd};

const ENGINES: [EngineKind; 2] = [EngineKind::Auto, EngineKind::Threads];

#[test]
fn tasks_interleave_and_join() {
    for engine in ENGINES {
        let sum = executor::block_on_with(engine, async {
            let total = Rc::new(Cell::new(0));
            let mut handles = Vec::new();
            for n in 1..=100u32 {
                let total = total.clone();
                handles.push(spawn_local(async move {
                    yield_now().await;
                    total.set(total.get() + n);
                    n
                }));
            }
            let mut sum = 0;
            for handle in handles {
                sum += handle.await;
            }
            assert_eq!(total.get(), sum);
            sum
        });
        assert_eq!(sum.unwrap(), 5050);
    }
}

#[test]
fn wait_queue_wakes_all() {
    executor::block_on(async {
        let queue = Rc::new(WaitQueue::default());
        let woken = Rc::new(Cell::new(0));
        let handles: Vec<_> = (0..5)
            .map(|_| {
                let (queue, woken) = (queue.clone(), woken.clone());
                spawn_local(async move {
                    queue.wait().await;
                    woken.set(woken.get() + 1);
                })
            })
            .collect();
        yield_now().await;
        assert_eq!(woken.get(), 0);
        queue.wake_all();
        for handle in handles {
            handle.await;
        }
        assert_eq!(woken.get(), 5);
    })
    .unwrap();
}

#[test]
fn doorbells_from_other_threads_are_heard() {
    for engine in ENGINES {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let bell = eventfd(0, flags).unwrap();
            let ringer: OwnedFd = bell.try_clone().unwrap();
            let thread = IoThread::start("doorbell", engine).unwrap();
            let heard = Arc::new(AtomicU32::new(0));
            let counter = heard.clone();
            thread.handle().spawn(move || async move {
                let source = EventSource::new(bell).unwrap();
                loop {
                    let rings = source.wait().await.unwrap();
                    counter.fetch_add(u32::try_from(rings).unwrap(), Ordering::SeqCst);
                }
            });
            for _ in 0..50 {
                rustix::io::write(&ringer, &1u64.to_ne_bytes()).unwrap();
            }
            while heard.load(Ordering::SeqCst) < 50 {
                std::thread::sleep(Duration::from_millis(1));
            }
            thread.stop();
            assert_eq!(heard.load(Ordering::SeqCst), 50);
        }
    }
}

#[test]
fn calls_return_values_and_stopped_threads_refuse() {
    for engine in ENGINES {
        let thread = IoThread::start("calls", engine).unwrap();
        let handle = thread.handle().clone();
        let value = handle.call(|| async {
            executor::sleep(Duration::from_millis(2)).await.unwrap();
            let local = Rc::new(41);
            yield_now().await;
            *local + 1
        });
        assert_eq!(value.unwrap(), 42);
        thread.stop();
        assert!(handle.call(|| async { 1 }).is_err());
    }
}

#[test]
fn many_remote_wakes_are_not_lost() {
    for engine in ENGINES {
        let thread = IoThread::start("wakes", engine).unwrap();
        let callers: Vec<_> = (0..4)
            .map(|_| {
                let handle = thread.handle().clone();
                std::thread::spawn(move || {
                    (0..500u32)
                        .map(|n| handle.call(move || async move { n }).unwrap())
                        .sum::<u32>()
                })
            })
            .collect();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), 499 * 500 / 2);
        }
    }
}

#[test]
fn computations_run_elsewhere() {
    for engine in ENGINES {
        executor::block_on_with(engine, async {
            let here = std::thread::current().id();
            let jobs: Vec<_> = (0..50u64)
                .map(|n| {
                    spawn_local(executor::offload(move || {
                        (n * n, std::thread::current().id())
                    }))
                })
                .collect();
            for (n, job) in jobs.into_iter().enumerate() {
                let (square, place) = job.await;
                assert_eq!(square, (n * n) as u64);
                assert_ne!(place, here);
            }
        })
        .unwrap();
    }
}

#[test]
fn sockets_carry_both_directions_at_once() {
    use block::IoBuf;
    use block::executor::Socket;
    for engine in ENGINES {
        executor::block_on_with(engine, async {
            let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
            let (a, b) = (
                Rc::new(Socket::new(a.into()).unwrap()),
                Rc::new(Socket::new(b.into()).unwrap()),
            );
            // More than the kernel's buffers hold, so writers have to wait for readers.
            let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7 % 251) as u8).collect();
            let send = |socket: Rc<Socket>| {
                let half = IoBuf::from_slice(&bytes[..1_000_001]);
                let rest = IoBuf::from_slice(&bytes[1_000_001..]);
                spawn_local(async move {
                    socket
                        .write_all(IoBuf::concat(&[half, rest]))
                        .await
                        .unwrap()
                })
            };
            let receive = |socket: Rc<Socket>, length: usize| {
                spawn_local(async move {
                    let mut got = Vec::new();
                    while got.len() < length {
                        let buf = IoBuf::zeroed(100_000);
                        let n = socket.read(buf.clone()).await.unwrap();
                        assert!(n > 0);
                        got.extend(buf.slice(0, n).to_vec());
                    }
                    got
                })
            };
            let writers = [send(a.clone()), send(b.clone())];
            let readers = [
                receive(a.clone(), bytes.len()),
                receive(b.clone(), bytes.len()),
            ];
            for writer in writers {
                writer.await;
            }
            for reader in readers {
                assert!(reader.await == bytes);
            }
            // A reader that waits is woken by the end.
            let waiting = {
                let b = b.clone();
                spawn_local(async move { b.read(IoBuf::zeroed(1)).await.unwrap() })
            };
            yield_now().await;
            b.shutdown();
            assert_eq!(waiting.await, 0);
            assert!(a.write_all(IoBuf::zeroed(10)).await.is_err());
        })
        .unwrap();
    }
}

/// How many descriptors the process has that are timers.
fn timers() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = links.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().contains("timerfd"))
        .count()
}

#[test]
fn what_nobody_waits_for_is_given_up() {
    use std::future::Future;
    use std::task::Poll;
    for kind in ENGINES {
        executor::block_on_with(kind, async {
            let mut sleeping: Vec<_> = (0..50)
                .map(|_| Box::pin(executor::sleep(Duration::from_secs(1000))))
                .collect();
            std::future::poll_fn(|cx| {
                for sleep in &mut sleeping {
                    assert!(sleep.as_mut().poll(cx).is_pending());
                }
                Poll::Ready(())
            })
            .await;
            executor::sleep(Duration::from_millis(1)).await.unwrap();
            assert!(timers() >= 50);
            drop(sleeping);
            // The kernel tells of what it gave up soon after.
            for _ in 0..1000 {
                if timers() < 50 {
                    break;
                }
                executor::sleep(Duration::from_millis(1)).await.unwrap();
            }
            assert!(timers() < 50, "{kind:?}: {} are left", timers());
        })
        .unwrap();
    }
    // The end of an executor gives up what its tasks waited for.
    for kind in ENGINES {
        executor::block_on_with(kind, async {
            for _ in 0..50 {
                spawn_local(executor::sleep(Duration::from_secs(1000)));
            }
            executor::sleep(Duration::from_millis(1)).await.unwrap();
            assert!(timers() >= 50);
        })
        .unwrap();
        assert!(timers() < 50, "{kind:?}: {} are left", timers());
    }
}
