//! Lists the tools of an MCP server.

use std::sync::Arc;

use parking_lot::Mutex;
use rmcp::{
    ServiceExt,
    model::{ClientRequest, Extensions, ListToolsRequest, PaginatedRequestParams, ServerResult},
    transport::{StreamableHttpClientTransport, streamable_http_client::StreamableHttpClientTransportConfig},
};

use serde_json::Value;

use crate::{
    cli::CliError,
    listed::{self, Catalogue},
};

/// The maximum number of tools that are drafted: a user would not review more, and a server may list pages without end.
const MOST_TOOLS: usize = 1000;

/// The maximum number of redirects that are followed.
const MOST_REDIRECTS: usize = 10;

/// The redirects of a server.
#[derive(Clone, Default)]
struct Redirects {
    /// The last URL that a redirect led to.
    followed: Arc<Mutex<Option<String>>>,
    /// The status and the URL of a redirect that was not followed.
    refused: Arc<Mutex<Option<(u16, String)>>>,
}

impl Redirects {
    /// Returns a client that follows the redirects which keep origin, method and body, and stores where they lead.
    fn client(&self) -> Result<reqwest::Client, CliError> {
        let seen = self.clone();
        let policy = reqwest::redirect::Policy::custom(move |attempt| {
            let (status, url) = (attempt.status().as_u16(), attempt.url().to_string());
            // The token is for one origin.
            let stays = attempt.previous().last().is_some_and(|from| from.origin() == attempt.url().origin());
            if stays && matches!(status, 307 | 308) && attempt.previous().len() <= MOST_REDIRECTS {
                *seen.followed.lock() = Some(url);
                return attempt.follow();
            }
            *seen.refused.lock() = Some((status, url));
            attempt.stop()
        });
        let client = reqwest::Client::builder().redirect(policy).build();
        client.map_err(|error| CliError::new(format!("no HTTP client: {error}")))
    }
}

/// Returns all tools of a server, page by page, and its URL after redirects, if there were any.
pub(super) async fn list(url: &str, token: Option<&str>) -> Result<(Catalogue, Option<String>), CliError> {
    let redirects = Redirects::default();
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        // rmcp puts the Rust type of its transport before the reason.
        if let Some((status, to)) = &*redirects.refused.lock() {
            return CliError::new(format!(
                "{url}: expected {what}, found HTTP {status} with a redirect to {to}; give the right URL to --mcp"
            ));
        }
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
    let transport = StreamableHttpClientTransport::with_client(redirects.client()?, config);
    let session =
        ().serve(transport).await.map_err(|error| failed("an MCP server that speaks streamable HTTP", &error))?;
    let mut tools = Catalogue::default();
    let mut cursor = None;
    loop {
        let params = Some(PaginatedRequestParams::default().with_cursor(cursor));
        let request = ListToolsRequest { method: Default::default(), params, extensions: Extensions::default() };
        let page = session.send_request(ClientRequest::ListToolsRequest(request)).await;
        let next = match page.map_err(|error| failed("its list of tools", &error))? {
            ServerResult::ListToolsResult(page) => {
                tools.extend(page.tools, vec![]);
                page.next_cursor
            }
            // rmcp gives a list as it came if one tool of the list cannot be read.
            ServerResult::CustomResult(page) if page.0.get("tools").is_some_and(Value::is_array) => {
                let all = page.0.get("tools").and_then(Value::as_array).cloned().unwrap_or_default();
                let (read, odd) = listed::sort(all);
                tools.extend(read, odd);
                page.0.get("nextCursor").and_then(Value::as_str).map(str::to_owned)
            }
            _ => return Err(failed("its list of tools", &"it answered with another result")),
        };
        if tools.len() > MOST_TOOLS {
            return Err(CliError::new(format!(
                "{url}: expected at most {MOST_TOOLS} tools, found more; a person must read one contract for each tool"
            )));
        }
        cursor = next;
        if cursor.is_none() {
            break;
        }
    }
    let followed = redirects.followed.lock().clone();
    // The list is complete. A session that does not close is the server's problem.
    let _ = session.cancel().await;
    Ok((tools, followed))
}
