//! Tests of drafts from a real MCP server over HTTP: their content, and that they pass the linter.

use std::{fs, sync::Arc};

use axum::{http::StatusCode, response::IntoResponse};
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    model::{ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig, Tool, ToolAnnotations},
    service::RequestContext,
    transport::streamable_http_server::{
        StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
    },
};
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    api::ToolContract,
    cli::lint::{self, Source},
};

/// A server that lists two tools a page.
#[derive(Clone)]
struct Server(Vec<Tool>);

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    async fn list_tools(
        &self,
        request: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let start: usize = request.and_then(|page| page.cursor).map_or(0, |cursor| cursor.parse().unwrap());
        let end = (start + 2).min(self.0.len());
        let mut page = ListToolsResult::with_all_items(self.0[start..end].to_vec());
        page.next_cursor = (end < self.0.len()).then(|| end.to_string());
        Ok(page)
    }
}

/// Starts the server and returns its URL.
async fn serve(tools: Vec<Tool>) -> String {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = Server(tools);
    let service: StreamableHttpService<Server, LocalSessionManager> =
        StreamableHttpService::new(move || Ok(server.clone()), Arc::default(), StreamableHttpServerConfig::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().nest_service("/mcp", service)).await });
    format!("http://{address}/mcp")
}

fn tool(name: &str, description: &str, schema: Value) -> Tool {
    Tool::new(name.to_owned(), description.to_owned(), schema.as_object().unwrap().clone())
}

fn hinted(name: &str, hints: Value) -> Tool {
    let mut tool = tool(name, "Does it.", json!({"type": "object"}));
    tool.annotations = Some(serde_json::from_value::<ToolAnnotations>(hints).unwrap());
    tool
}

async fn init(args: &[&str]) -> (Result<u8, CliError>, String, String) {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }
    let cli: Cli = clap::Parser::parse_from([&["contract", "init"], args].concat());
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = run(&cli.args, &mut out, &mut notes).await;
    (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
}

fn contracts(text: &str) -> Vec<ToolContract> {
    serde_saphyr::from_multiple(text).unwrap()
}

/// Tools that a sloppy, outdated or hostile server would list.
fn unpleasant() -> Vec<Tool> {
    let point = json!({"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}, "on": {}}, "required": ["x", "y"]});
    let old = json!({"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"a": {"type": "array", "items": [{"type": "string"}]}}});
    let remote =
        json!({"type": "object", "properties": {"a": {"$ref": "https://evil.test/x"}, "b": {"type": "strin"}}});
    let dangling = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}});
    let many: Map<String, Value> = (0..80).map(|n| (format!("k{n}"), json!(1))).collect();
    vec![
        tool("plot", "Draws: a point # not a comment", point),
        tool("old", "yes", old),
        tool("remote", "on\n---\nkind: PolicyPack\u{1b}[2J\u{202e}", remote),
        tool("dangling", "", dangling),
        tool("no type", "A.", json!({"properties": {"a": {"type": "string"}}})),
        tool("No/Type", "B.", json!({"type": "string"})),
        tool("NO_type\n# apiVersion: x", &"long ".repeat(2000), json!({})),
        tool("größe", "ü", Value::Object(many)),
        tool("", "Nameless.", json!({"type": "object"})),
        tool(&"x".repeat(200), "Long.", json!({"type": "object"})),
    ]
}

#[tokio::test]
async fn drafts_what_is_listed_and_lints() {
    let url = serve(unpleasant()).await;
    let args = ["--mcp", &url, "--url", "https://tools.example.com/mcp", "--namespace", "team-a"];
    let (code, out, notes) = init(&args).await;
    assert_eq!(code.unwrap(), 0, "{notes}");
    let contracts = contracts(&out);
    let names: Vec<_> = contracts.iter().map(|contract| contract.metadata.name.as_deref().unwrap()).collect();
    assert_eq!(names, ["plot", "old", "remote", "dangling", "no-type", "no-type-2", "no-type-apiversion-x", "gr-e"]);
    let upstream: Vec<_> =
        contracts.iter().map(|contract| contract.spec.upstream.mcp.as_ref().unwrap().tool.as_str()).collect();
    assert_eq!(
        upstream[4..7],
        ["no type", "No/Type", "NO_type\n# apiVersion: x"],
        "the server's own names go upstream"
    );
    assert_eq!(contracts[4].spec.tool, "no_type");
    assert!(contracts.iter().all(|contract| contract.metadata.namespace.as_deref() == Some("team-a")));
    assert!(contracts.iter().all(|contract| contract.spec.side_effect.as_str() == "write"));
    assert_eq!(contracts[0].spec.input["additionalProperties"], json!(false));
    assert_eq!(contracts[0].spec.input["properties"]["y"], json!({"type": "number"}));
    assert_eq!(contracts[1].spec.description, "yes");
    assert_eq!(contracts[2].spec.description, "on\n---\nkind: PolicyPack\u{1b}[2J\u{202e}");
    assert_eq!(contracts[2].spec.input["properties"]["a"], json!({}));
    assert_eq!(contracts[3].spec.input, json!({"type": "object", "additionalProperties": false}));
    assert_eq!(out.matches("# DRAFT").count(), 8);
    assert!(out.contains("# input: /properties/a/$ref was dropped"), "{out}");
    assert!(out.contains("# input: $schema was dropped"), "{out}");
    assert!(!out.chars().any(|c| c != '\n' && (c.is_control() || c == '\u{202e}')), "{out:?}");
    assert_eq!(notes.matches("left out:").count(), 2, "{notes}");
    assert!(!notes.contains("belay lint will say"), "{notes}");
    let outcome =
        lint::lint(&[Source { path: "out.yaml".into(), bytes: out.clone().into_bytes() }], "default").unwrap();
    assert!(outcome.diagnostics.is_empty(), "{:#?}\n{out}", outcome.diagnostics);
    assert_eq!(outcome.objects, 8);
}

#[rstest::rstest]
#[case::nothing(json!({}), "write")]
#[case::read_only(json!({"readOnlyHint": true}), "read")]
#[case::read_only_and_open(json!({"readOnlyHint": true, "openWorldHint": true}), "read")]
#[case::contradiction(json!({"readOnlyHint": true, "destructiveHint": true}), "write")]
#[case::open(json!({"openWorldHint": true}), "external")]
#[case::said_to_be_harmless(json!({"readOnlyHint": false, "destructiveHint": false, "openWorldHint": false}), "write")]
fn hints_only_tighten(#[case] hints: Value, #[case] effect: &str) {
    let (drafts, _) = drafts(&[hinted("a", hints)], "https://tools.example.com/mcp", None);
    let contracts = contracts(&drafts[0].text);
    assert_eq!(contracts[0].spec.side_effect.as_str(), effect);
    assert!(drafts[0].text.contains(&format!("# sideEffect: {effect}, because")), "{}", drafts[0].text);
}

#[tokio::test]
async fn writes_a_file_a_tool_and_overwrites_none() {
    let url = serve(vec![hinted("a", json!({})), hinted("b", json!({})), hinted("c", json!({}))]).await;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("contracts");
    let args = ["--mcp", &url, "--out", out.to_str().unwrap()];
    let (code, text, notes) = init(&args).await;
    assert_eq!((code.unwrap(), text.as_str()), (0, ""), "{notes}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3, "all pages");
    let address = "a.yaml:16:7: error: spec.upstream.mcp.url: expected the URL of an MCP server";
    assert!(notes.contains(address) && notes.contains("addresses are not names"), "{notes}");
    fs::remove_file(out.join("a.yaml")).unwrap();
    fs::write(out.join("b.yaml"), "mine").unwrap();
    let error = init(&args).await.0.unwrap_err().to_string();
    assert!(error.contains("b.yaml: expected no such file"), "{error}");
    assert!(!out.join("a.yaml").exists(), "nothing was written");
    assert_eq!(fs::read_to_string(out.join("b.yaml")).unwrap(), "mine");
}

/// Starts a server that answers `tools/list` with these tools as they are, and returns its URL.
async fn serve_raw(tools: Value) -> String {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let answer = move |axum::Json(asked): axum::Json<Value>| {
        let tools = tools.clone();
        async move {
            let result = match asked["method"].as_str().unwrap_or_default() {
                "initialize" => json!({
                    "protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"},
                }),
                "tools/list" => json!({"tools": tools}),
                _ if asked.get("id").is_none() => return StatusCode::ACCEPTED.into_response(),
                _ => {
                    let error = json!({"code": -32601, "message": "Method not found"});
                    return axum::Json(json!({"jsonrpc": "2.0", "id": asked["id"], "error": error})).into_response();
                }
            };
            axum::Json(json!({"jsonrpc": "2.0", "id": asked["id"], "result": result})).into_response()
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let to = |status: u16, location: &'static str| {
        let status = StatusCode::from_u16(status).unwrap();
        axum::routing::any(move || async move { (status, [("location", location)]).into_response() })
    };
    let router = axum::Router::new()
        .route("/mcp", axum::routing::post(answer))
        .route("/temporary", to(307, "/permanent"))
        .route("/permanent", to(308, "/mcp"))
        .route("/moved", to(301, "/mcp"))
        .route("/loop", to(307, "/loop"));
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/mcp")
}

#[tokio::test]
async fn drafts_have_the_url_that_redirects_lead_to() {
    let url = serve_raw(json!([{"name": "a", "inputSchema": {"type": "object"}}])).await;
    let at = |path: &str| url.replace("/mcp", path);
    let drafted = |out: &str| contracts(out)[0].spec.upstream.mcp.as_ref().unwrap().url.clone();
    let (code, out, notes) = init(&["--mcp", &at("/temporary")]).await;
    assert_eq!(code.unwrap(), 0, "{notes}");
    assert_eq!(drafted(&out), url);
    assert!(notes.contains(&format!("{} redirects to {url}: the drafts have that URL", at("/temporary"))), "{notes}");
    let (code, out, notes) = init(&["--mcp", &at("/temporary"), "--url", "https://tools.example.com/x"]).await;
    assert_eq!((code.unwrap(), drafted(&out).as_str()), (0, "https://tools.example.com/x"));
    assert!(notes.contains("check the path of --url"), "{notes}");
    // The control: without a redirect there is no note.
    let (_, out, notes) = init(&["--mcp", &url]).await;
    assert!(drafted(&out) == url && !notes.contains("redirects"), "{notes}");
    for (path, words) in [("/moved", format!("HTTP 301 with a redirect to {url}")), ("/loop", "redirect".to_owned())] {
        let error = init(&["--mcp", &at(path)]).await.0.unwrap_err().to_string();
        assert!(error.contains(&words), "{error}");
    }
}

#[tokio::test]
async fn an_odd_tool_is_left_out_and_the_others_are_drafted() {
    let tool = |name: &str| json!({"name": name, "inputSchema": {"type": "object"}});
    let tools = json!([tool("a"), {"name": "odd"}, tool("twice"), tool("twice"), tool("b")]);
    let (code, out, notes) = init(&["--mcp", &serve_raw(tools).await]).await;
    assert_eq!(code.unwrap(), 0, "{notes}");
    let names: Vec<_> = contracts(&out).into_iter().map(|contract| contract.spec.tool).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(notes.contains("left out: the tool `odd`: ") && notes.contains("no `inputSchema`"), "{notes}");
    assert!(notes.contains("left out: the tool `twice`: ") && notes.contains("2 times"), "{notes}");
}

#[tokio::test]
async fn says_what_is_wrong_with_the_server() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    for (url, words) in [("ftp://x", "http://"), ("http://127.0.0.1:1/mcp", "127.0.0.1:1")] {
        let error = init(&["--mcp", url]).await.0.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let url = serve(Vec::new()).await;
    assert!(init(&["--mcp", &url]).await.0.unwrap_err().to_string().contains("expected tools"));
}
