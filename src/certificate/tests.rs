use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use rcgen::{CertificateParams, KeyPair};

use super::*;

/// Writes a certificate for `name` and its key.
fn write(folder: &Path, name: &str) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(folder.join("tls.crt"), certificate.pem()).unwrap();
    std::fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
}

/// What a process reports of its certificate: `belay_gateway_certificate_ok` is 1 while the files can be used, and 0 while they cannot.
#[tokio::test(start_paused = true)]
async fn a_certificate_that_cannot_be_loaded_is_reported_until_it_can() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "one.test");
    // 2 is neither.
    let reported = Arc::new(AtomicU32::new(2));
    let report = reported.clone();
    let (_, follow) =
        serve(folder.path().to_owned(), move |good| report.store(u32::from(good), Ordering::SeqCst)).unwrap();
    assert_eq!(reported.load(Ordering::SeqCst), 1, "from the start on");
    tokio::spawn(follow);
    let after_a_look = async || {
        reported.store(2, Ordering::SeqCst);
        tokio::time::sleep(LOOK + Duration::from_secs(1)).await;
        reported.load(Ordering::SeqCst)
    };
    assert_eq!(after_a_look().await, 1, "the same files");
    write(folder.path(), "two.test");
    assert_eq!(after_a_look().await, 1, "renewed");
    let good = std::fs::read(folder.path().join("tls.key")).unwrap();
    for (file, broken) in
        [("tls.crt", "no certificate".to_owned()), ("tls.key", KeyPair::generate().unwrap().serialize_pem())]
    {
        let good = std::fs::read(folder.path().join(file)).unwrap();
        std::fs::write(folder.path().join(file), broken).unwrap();
        for _ in 0..3 {
            assert_eq!(after_a_look().await, 0, "{file}");
        }
        std::fs::write(folder.path().join(file), good).unwrap();
        assert_eq!(after_a_look().await, 1, "{file} is mended");
    }
    std::fs::remove_file(folder.path().join("tls.key")).unwrap();
    assert_eq!(after_a_look().await, 0, "it is gone");
    std::fs::write(folder.path().join("tls.key"), good).unwrap();
    assert_eq!(after_a_look().await, 1);
}
