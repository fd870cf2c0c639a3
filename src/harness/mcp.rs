//! The MCP server that the agent sees.
//!
//! Supported MCP versions, with the agent and with upstreams alike, over streamable HTTP: 2024-11-05, 2025-03-26, 2025-06-18 and
//! 2025-11-25, which begin with `initialize`, and 2026-07-28, in which each request is independent after `server/discover`.
//!
//! Guarantees: what the agent sees of a tool, its name, description and schemas, comes from the contract. Nothing that an upstream lists is
//! passed on. The server is stateless in all versions: there is no session that could be lost and no stream of the server's own.
//!
//! Non-goals: decisions about calls, see [`tools`](super::tools).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use rmcp::{
    RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ErrorData as McpError, Implementation,
        ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig, Tool as McpTool, ToolAnnotations,
    },
    service::RequestContext,
};
use serde_json::{Map, Value};

use super::tools::{Tools, sized};
use crate::policy::config::{SideEffect, Tool};

/// The arguments of a call, parsed before rmcp parses the message around them, with the number of bytes in which the whole message came.
/// They can be taken once.
#[derive(Clone)]
pub struct Read(Arc<Mutex<Option<Measured>>>);

/// Arguments, and the number of bytes in which they came.
type Measured = (Map<String, Value>, usize);

impl Read {
    /// Stores arguments that came in a text of this length.
    pub fn new(arguments: Map<String, Value>, length: usize) -> Self {
        Self(Arc::new(Mutex::new(Some((arguments, length)))))
    }

    fn take(&self) -> Option<(Map<String, Value>, usize)> {
        self.0.lock().take()
    }
}

/// An extension of a request: whether its call has reached the pipeline, which records what becomes of it.
#[derive(Clone, Default)]
pub struct Reached(Arc<AtomicBool>);

impl Reached {
    /// Returns whether the call has reached the pipeline.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The MCP server for the agent. Its calls go through the pipeline of all tools.
#[derive(Clone)]
pub struct McpServer(Tools);

impl McpServer {
    /// Creates a server for these tools.
    pub fn new(tools: Tools) -> Self {
        Self(tools)
    }
}

impl ServerHandler for McpServer {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("belay", env!("CARGO_PKG_VERSION")))
            .with_instructions(
                "Belay checks every call against its contract. A denial names the rule. The same call is denied again.",
            )
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, McpError> {
        Ok(ListToolsResult::with_all_items(self.0.gate().contracts().tools().map(advertise).collect()))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, McpError> {
        let parts = context.extensions.get::<http::request::Parts>();
        if let Some(reached) = parts.and_then(|parts| parts.extensions.get::<Reached>()) {
            reached.0.store(true, Ordering::SeqCst);
        }
        // The arguments were parsed before and are not parsed again.
        let args = match parts.and_then(|parts| parts.extensions.get::<Read>()).and_then(Read::take) {
            Some(args) => args,
            None => sized(request.arguments.unwrap_or_default()),
        };
        // A denial is a result and not a protocol error, because the model must see it and not only the client library.
        let came = self.0.call(&request.name, args, None).await.map(|came| came.result);
        let result = came.unwrap_or_else(|denial| CallToolResult::error(vec![ContentBlock::text(denial.told("call"))]));
        Ok(CallToolResponse::Complete(result))
    }
}

fn advertise(tool: &Tool) -> McpTool {
    let input = tool.input.as_object().cloned().unwrap_or_default();
    let mut advertised = McpTool::new(tool.name.clone(), tool.description.clone(), Arc::new(input));
    advertised.output_schema = tool.output.as_ref().and_then(|output| output.as_object().cloned()).map(Arc::new);
    advertised.annotations = Some(ToolAnnotations::from_raw(
        None,
        Some(tool.side_effect == SideEffect::Read),
        Some(tool.side_effect != SideEffect::Read),
        None,
        Some(tool.side_effect == SideEffect::External),
    ));
    advertised
}
