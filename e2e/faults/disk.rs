//! A spool on a full file system: no call leaves without a record, nothing is lost, and calls continue when there is room.

use std::{fs::File, io::Write, path::PathBuf, time::Duration};

use serde_json::json;

use super::{
    alone::once,
    judge::judge,
    world::{Setting, Told, World},
};

/// The size of the spool's file system.
const SIZE: u64 = 1 << 20;

/// Files that fill a file system except for `room` bytes, and take every inode, so that no file can be created to replace the spool.
struct Ballast(Vec<PathBuf>);

impl Ballast {
    fn new(world: &World, room: u64) -> Self {
        let mut files = Vec::new();
        let path = |n: usize| world.spool.join(format!("ballast-{n}"));
        while let Ok(mut file) = File::create_new(path(files.len())) {
            while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
            files.push(path(files.len()));
        }
        let first = File::options().write(true).open(&files[0]).unwrap();
        first.set_len(first.metadata().unwrap().len() - room).unwrap();
        Self(files)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    }
}

async fn with_a_small_spool() -> World {
    let world = World::new(Setting { spool: Some(SIZE), ..Setting::default() }).await;
    world.begin();
    world.insist("note").await;
    world
}

/// The room decides which segment no longer fits.
#[rstest::rstest]
fn calls_wait_for_room(#[values(0, 4096, 16_384)] room: u64) {
    once(async || {
        let world = with_a_small_spool().await;
        let ballast = Ballast::new(&world, room);
        let calls = async {
            for _ in 0..20 {
                world.insist("note").await;
            }
        };
        let room = async {
            tokio::time::sleep(Duration::from_secs(4)).await;
            drop(ballast);
        };
        tokio::join!(calls, room);
        world.work().await;
        judge(&world).await;
    });
}

#[test]
fn a_task_parks_while_there_is_no_room_for_long() {
    once(async || {
        let world = with_a_small_spool().await;
        let ballast = Ballast::new(&world, 0);
        // Some of the calls still fit into the spool's last page.
        let calls = (0..12).map(|_| world.call("note", json!({"n": world.n()})));
        let told = futures::future::join_all(calls).await;
        let waited = |told: &&Told| matches!(told, Told::Refused(rule, _) if rule == "evidence.unavailable");
        let (refused, made) = told.iter().partition::<Vec<_>, _>(waited);
        assert!(!refused.is_empty() && made.iter().all(|told| matches!(told, Told::Result(_))), "{told:?}");
        assert_eq!(world.effects.count("note"), 1 + made.len());
        drop(ballast);
        world.work().await;
        judge(&world).await;
        assert_eq!(world.harness.starts(), 1, "the harness did not go on by itself");
    });
}

/// A harness that is killed on a full file system before its segments are stored loses none of them.
#[test]
fn a_harness_that_is_killed_without_room_comes_back_with_it() {
    once(async || {
        let world = with_a_small_spool().await;
        world.s3.stop();
        let ballast = Ballast::new(&world, 8192);
        let killing = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            world.harness.kill();
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(ballast);
            world.s3.keep();
        };
        let call = world.call("note", json!({"n": world.n()}));
        let (told, ()) = tokio::join!(call, killing);
        assert_eq!(told, Told::Nothing);
        world.work().await;
        judge(&world).await;
    });
}
