//! The upstream that counts: an HTTP API and an MCP server. Every call is an effect, recorded with its time and with the content of the
//! harness's spool at that time.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Instant,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    routing::{any, get, post},
};
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ListToolsResult, PaginatedRequestParams,
        ServerCapabilities, ServerConfig, Tool,
    },
    service::RequestContext,
    transport::streamable_http_server::{
        StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
    },
};
use serde_json::{Value, json};

/// The host name in the contracts.
pub const HOST: &str = "tools.test";
/// The address of the host.
pub const ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(198, 51, 100, 20);

/// A call that took effect.
#[derive(Clone, Debug)]
pub struct Effect {
    /// The tool.
    pub tool: String,
    /// The arguments.
    pub args: Value,
    /// The time of the call.
    pub at: Instant,
    /// The content of the spool at that time.
    pub spool: Arc<str>,
}

/// All calls that took effect.
#[derive(Clone)]
pub struct Effects {
    all: Arc<Mutex<Vec<Effect>>>,
    spool: PathBuf,
}

impl Effects {
    /// Starts the upstream. `spool` is the path of the harness's spool file.
    pub async fn start(spool: PathBuf) -> Self {
        let effects = Self { all: Arc::default(), spool };
        let mut config = StreamableHttpServerConfig::default();
        config.allowed_hosts = vec![HOST.into()];
        config.legacy_session_mode = false;
        config.json_response = true;
        let served = effects.clone();
        let mcp = StreamableHttpService::new(move || Ok(served.clone()), Arc::<LocalSessionManager>::default(), config);
        let router = Router::new()
            .route("/look/{n}", get(look))
            .route("/call/{tool}", post(call))
            .route(
                "/mcp",
                any(move |request: axum::extract::Request| {
                    let mcp = mcp.clone();
                    async move { mcp.handle(request).await.map(Body::new) }
                }),
            )
            .with_state(effects.clone());
        let listener = tokio::net::TcpListener::bind((ADDRESS, 80)).await.unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        effects
    }

    /// Returns all effects so far.
    pub fn all(&self) -> Vec<Effect> {
        self.all.lock().unwrap().clone()
    }

    /// Returns the number of effects of a tool.
    pub fn count(&self, tool: &str) -> usize {
        self.all.lock().unwrap().iter().filter(|effect| effect.tool == tool).count()
    }

    fn note(&self, tool: &str, args: Value) -> Value {
        let spool = std::fs::read_to_string(&self.spool).unwrap_or_default().into();
        let mut all = self.all.lock().unwrap();
        all.push(Effect { tool: tool.to_owned(), args, at: Instant::now(), spool });
        json!({"effect": all.len()})
    }
}

async fn look(State(effects): State<Effects>, Path(n): Path<u64>) -> Json<Value> {
    Json(effects.note("look", json!({"n": n})))
}

async fn call(State(effects): State<Effects>, Path(tool): Path<String>, Json(args): Json<Value>) -> Json<Value> {
    Json(effects.note(&tool, args))
}

impl ServerHandler for Effects {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let schema = json!({"type": "object"}).as_object().cloned().unwrap_or_default();
        Ok(ListToolsResult::with_all_items(vec![Tool::new("say", "Says something.", Arc::new(schema))]))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let args = Value::from(request.arguments.unwrap_or_default());
        Ok(CallToolResponse::Complete(CallToolResult::structured(self.note(&request.name, args))))
    }
}
