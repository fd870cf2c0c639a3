// An agent written with the official TypeScript SDK: `client.cjs URL '[["tool", {…}], …]'`. Prints what it saw as JSON.
const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");

async function main(url, calls) {
  const client = new Client({ name: "peer", version: "1" });
  const transport = new StreamableHTTPClientTransport(new URL(url));
  await client.connect(transport);
  const { tools } = await client.listTools();
  const results = [];
  for (const [name, args] of calls) {
    const result = await client.callTool({ name, arguments: args });
    const text = result.content.filter((part) => part.type === "text").map((part) => part.text).join("\n");
    results.push({ isError: result.isError === true, text, structured: result.structuredContent ?? null });
  }
  const listed = tools.map(({ name, outputSchema }) => ({ name, outputSchema: outputSchema ?? null }));
  console.log(JSON.stringify({ protocol: transport.protocolVersion, tools: listed, results }));
  await client.close();
}

main(process.argv[2], JSON.parse(process.argv[3])).catch((error) => {
  console.error(error);
  process.exit(1);
});
