//! Lists the tools of an MCP server.

use rmcp::{
    ServiceExt,
    model::{PaginatedRequestParams, Tool},
    transport::{StreamableHttpClientTransport, streamable_http_client::StreamableHttpClientTransportConfig},
};

use crate::cli::CliError;

/// The maximum number of tools that are drafted: a user would not review more, and a server may list pages without end.
const MOST_TOOLS: usize = 1000;

/// Returns all tools of a server, page by page.
pub(super) async fn list(url: &str, token: Option<&str>) -> Result<Vec<Tool>, CliError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        // rmcp puts the Rust type of its transport before the reason.
        let text = error.to_string();
        let reason = text.rsplit("] error: ").next().unwrap_or(&text);
        CliError::new(format!("{url}: expected {what}, found none: {reason}"))
    };
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(CliError::new(format!("--mcp: expected an http:// or https:// URL, found {url}")));
    }
    let mut config = StreamableHttpClientTransportConfig::with_uri(url);
    if let Some(token) = token {
        config = config.auth_header(token);
    }
    let transport = StreamableHttpClientTransport::from_config(config);
    let session =
        ().serve(transport).await.map_err(|error| failed("an MCP server that speaks streamable HTTP", &error))?;
    let mut tools = Vec::new();
    let mut cursor = None;
    loop {
        let page = PaginatedRequestParams::default().with_cursor(cursor);
        let page = session.list_tools(Some(page)).await.map_err(|error| failed("its list of tools", &error))?;
        tools.extend(page.tools);
        if tools.len() > MOST_TOOLS {
            return Err(CliError::new(format!(
                "{url}: expected at most {MOST_TOOLS} tools, found more; a person must read one contract for each tool"
            )));
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    // The list is complete. A session that does not close is the server's problem.
    let _ = session.cancel().await;
    Ok(tools)
}
