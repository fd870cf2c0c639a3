// The prompts, and one line of output for each part, as parts.py has them for Python.
export const TOOLS = "[tools] Use get_weather for Tokyo.";
export const STREAMING = "[streaming] Use get_weather for Tokyo.";
export const PARALLEL = "[parallel] Use get_weather and get_time for Tokyo.";
export const TOGETHER = ["[together] Say hello to Tokyo. take 2000 ms", "[together] Say goodbye to Tokyo. take 2000 ms"];
export const STRUCTURED = "[structured] Describe Tokyo.";

export const weather = (city) => `It is sunny in ${city}.`;
export const timeOf = (city) => `It is noon in ${city}.`;

export function holds(found, what) {
  if (!found) throw new Error(`expected it to be so: ${what}`);
}

export const ended = (text) => holds(String(text).includes("THE END"), `the model's last words, found ${text}`);

// Runs each part, even if earlier parts failed.
export async function main(parts) {
  let failed = 0;
  for (const [name, does] of Object.entries(parts)) {
    try {
      await does();
      console.log(`PART ${name} ok`);
    } catch (error) {
      failed += 1;
      console.error(error);
      console.log(`PART ${name} failed ${String(error).replace(/\s+/g, " ").slice(0, 300)}`);
    }
  }
  process.exit(failed ? 1 : 0);
}
