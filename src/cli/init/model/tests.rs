//! Tests of base URLs as users paste them.

use rstest::rstest;

use super::*;
use crate::cli::init::{AGENT, PACK, STANDIN};

/// A network in which some names have addresses.
fn find(host: &Hostname) -> Vec<IpAddr> {
    let found: &[&str] = match host.as_str() {
        "gpubox" | "gpu.lan" => &["192.168.1.5"],
        "six.lan" => &["fd00::5"],
        "both.lan" => &["fd00::5", "10.0.0.5"],
        "llm.corp.example.com" => &["10.1.2.3"],
        "openrouter.ai" => &["104.18.2.115"],
        "bare" => &["104.18.2.115"],
        "myself" => &["127.0.1.1"],
        _ => &[],
    };
    found.iter().map(|address| address.parse().unwrap()).collect()
}

fn model(url: &str) -> Model {
    Model::new(url.parse().unwrap(), Some("m"), &find).unwrap_or_else(|error| panic!("{url}: {error}"))
}

#[rstest]
#[case::public("https://openrouter.ai/api/v1", "https://openrouter.ai/api", "")]
#[case::here("http://localhost:8000/v1/", "http://model.localhost:8000", "model.localhost=127.0.0.1:8000")]
#[case::here_by_address("http://127.0.0.1:8000", "http://model.localhost:8000", "model.localhost=127.0.0.1:8000")]
#[case::here_by_another("http://127.0.0.2:8000", "http://model.localhost:8000", "model.localhost=127.0.0.2:8000")]
#[case::here_by_six("http://[::1]:8000/v1", "http://model.localhost:8000", "model.localhost=[::1]:8000")]
#[case::here_without_a_port("http://localhost/v1", "http://model.localhost", "model.localhost=127.0.0.1:80")]
#[case::everywhere("http://0.0.0.0:8000/v1", "http://model.localhost:8000", "model.localhost=127.0.0.1:8000")]
#[case::below_localhost("http://vllm.localhost:8000", "http://vllm.localhost:8000", "vllm.localhost=127.0.0.1:8000")]
#[case::private("http://192.168.1.5:8000/v1", "http://model.internal:8000", "model.internal=192.168.1.5:8000")]
#[case::private_ten("http://10.0.0.5/v1", "http://model.internal", "model.internal=10.0.0.5:80")]
#[case::private_six("http://[fd00::5]:8000/v1", "http://model.internal:8000", "model.internal=[fd00::5]:8000")]
#[case::public_address("http://203.0.113.9:8000", "http://model.internal:8000", "model.internal=203.0.113.9:8000")]
#[case::one_label("http://gpubox:9911/v1", "http://gpubox.internal:9911", "gpubox.internal=192.168.1.5:9911")]
#[case::one_label_in_capitals("http://GPUbox:9911", "http://gpubox.internal:9911", "gpubox.internal=192.168.1.5:9911")]
#[case::one_label_public("http://bare:80", "http://bare.internal", "bare.internal=104.18.2.115:80")]
#[case::one_label_unknown("http://nobody:9911", "http://nobody.internal:9911", "nobody.internal=ADDRESS:9911")]
#[case::oneself("http://myself:8000", "http://myself.internal:8000", "myself.internal=127.0.1.1:8000")]
#[case::lan("http://gpu.lan:8000", "http://gpu.lan:8000", "gpu.lan=192.168.1.5:8000")]
#[case::lan_six("http://six.lan:8000", "http://six.lan:8000", "six.lan=[fd00::5]:8000")]
#[case::lan_both("http://both.lan:8000", "http://both.lan:8000", "both.lan=10.0.0.5:8000")]
#[case::lan_unknown("http://gone.local:8000", "http://gone.local:8000", "gone.local=ADDRESS:8000")]
#[case::home("http://nas.home.arpa", "http://nas.home.arpa", "nas.home.arpa=ADDRESS:80")]
#[case::service("http://vllm.models.svc:8080", "http://vllm.models.svc:8080", "vllm.models.svc=ADDRESS:8080")]
#[case::inside("https://llm.corp.example.com/v1", "https://llm.corp.example.com", "llm.corp.example.com=10.1.2.3:443")]
#[case::unknown("https://api.example.com/v1", "https://api.example.com", "")]
#[case::a_call(
    "http://localhost:8000/v1/chat/completions",
    "http://model.localhost:8000",
    "model.localhost=127.0.0.1:8000"
)]
#[case::another_call("https://openrouter.ai/api/v1/responses/", "https://openrouter.ai/api", "")]
#[case::a_call_alone("https://api.perplexity.ai/chat/completions", "https://api.perplexity.ai/chat/completions", "")]
#[case::its_own_version("https://g.example.com/v1beta/openai/", "https://g.example.com/v1beta/openai", "")]
#[case::a_query(
    "https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21",
    "https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21",
    ""
)]
fn a_base_url_becomes_a_host_of_the_pack_and_an_address(#[case] text: &str, #[case] url: &str, #[case] resolve: &str) {
    let model = model(text);
    assert_eq!(model.url(), url);
    let options = model.options();
    let resolved = options.split(" --resolve ").nth(1).unwrap_or_default();
    assert_eq!(resolved, resolve, "{options}");
    // A pack accepts the host, and `--resolve` accepts the same one.
    let host = &model.place.host;
    assert!(host.contains('.') && Hostname::parse(host).is_ok_and(|name| name.as_str() == host), "{host}");
    let (endpoint, egress) = model.lines();
    assert!(endpoint.contains(url) && egress.contains(&format!("host: {host}\n")), "{endpoint}{egress}");
}

#[rstest]
#[case("mistral", "base URL")]
#[case("ftp://a.test", "base URL")]
#[case("https://user:secret@a.test/v1", "--credential")]
#[case("http://a.test/\u{e4}", "base URL")]
#[case("http://a.test/ x: y", "base URL")]
#[case("", "base URL")]
#[case("http://localhost:0", "base URL")]
#[case("http://127.1:8000", "a full address")]
#[case("http://0x7f.1:8000", "a full address")]
#[case("http://gpu_box:8000", "by its address")]
#[case("http://localhost:8000/v1/messages", "Anthropic")]
fn what_is_none_is_refused(#[case] text: &str, #[case] word: &str) {
    let said = text.parse::<Provider>().unwrap_err();
    assert!(said.contains(word) && !said.contains("secret"), "{said}");
}

/// With https, the key is sent wherever the server is, and the certificate must be for the name in the pack. Without TLS, a key does not
/// leave this machine.
#[rstest]
#[case::public("https://openrouter.ai/api/v1", true, &[], "          credentials:")]
#[case::here_in_tls("https://127.0.0.1:8443/v1", true, &["certificate", "model.localhost", "--upstream-ca"], "          credentials:")]
#[case::there_in_tls("https://gpubox/v1", true, &["certificate", "gpubox.internal"], "          credentials:")]
#[case::here("http://127.0.0.1:8000/v1", false, &[], "          # credentials:")]
#[case::there("http://192.168.1.5:8000/v1", false, &["not encrypted", "no key"], "")]
#[case::unknown("http://gpu:8000/v1", false, &["replace ADDRESS", "not encrypted"], "")]
fn keys_and_certificates(#[case] url: &str, #[case] key: bool, #[case] notes: &[&str], #[case] line: &str) {
    let model = model(url);
    assert_eq!(model.options().contains("--credential model-key/token=env:MODEL_API_KEY"), key, "{}", model.options());
    let said = model.notes().join("\n");
    assert!(notes.iter().all(|word| said.contains(word)) && (!notes.is_empty() || said.is_empty()), "{said}");
    let (_, egress) = model.lines();
    assert_eq!(egress.contains("credentials:"), !line.is_empty(), "{egress}");
    assert!(egress.contains(line), "{egress}");
}

#[test]
fn a_server_is_asked_for_a_model_by_its_name() {
    let provider = || "http://localhost:8000".parse::<Provider>().unwrap();
    assert!(Model::new(provider(), None, &find).unwrap_err().contains("--model-name"));
    assert!(Model::new(provider(), Some("a\"\nb"), &find).unwrap_err().contains("letters"));
    assert_eq!(Model::new(provider(), Some("qwen3:8b"), &find).unwrap().name, "qwen3:8b");
}

/// Beside a real model, the stand-in has no script for a model, and the agent has no stand-in's name.
#[test]
fn beside_a_real_model_nothing_stands_in_for_one() {
    for provider in ["openai", "anthropic", "ollama", "http://localhost:8000"] {
        let model = model(provider);
        let texts = [model.standin(STANDIN), model.agent(AGENT), model.pack(PACK)].concat();
        for word in ["Stands in for a model", "stand-in", "SCRIPT", "def model", "model(body", "For a real model"] {
            assert!(!texts.contains(word), "{word} of {provider}: {texts}");
        }
        let shop = model.standin(STANDIN);
        assert!(shop.contains("ORDER[\"refunded\"] += body") && shop.contains("serve_forever()"), "{shop}");
    }
    assert!(STANDIN.contains("SCRIPT") && AGENT.contains("stand-in") && PACK.contains("For a real model"));
}
