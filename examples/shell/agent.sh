#!/usr/bin/env bash
# An agent that is a shell: whatever the model wants run, it runs (curl, jq). What comes of that is for its sandbox to decide.
set -euo pipefail
tools='[{"type": "function", "function": {"name": "shell", "description": "Runs a command with bash.",
  "parameters": {"type": "object", "required": ["command"], "properties": {"command": {"type": "string"}}}}}]'
messages=$(jq -n --arg objective "$BELAY_OBJECTIVE" '[{role: "user", content: $objective}]')
while :; do
  reply=$(jq -n --arg model "$MODEL" --argjson messages "$messages" --argjson tools "$tools" '$ARGS.named' |
    curl -sS --fail-with-body -H 'content-type: application/json' --data @- "$OPENAI_BASE_URL/chat/completions")
  message=$(jq -c '.choices[0].message' <<< "$reply")
  messages=$(jq -c --argjson message "$message" '. + [$message]' <<< "$messages")
  jq -r '.content // empty' <<< "$message"
  jq -e '.tool_calls' <<< "$message" > /dev/null || break
  while read -r call; do
    command=$(jq -r '.function.arguments | fromjson | .command' <<< "$call")
    result=$(bash -c "$command" 2>&1) || result+=" (exit code $?)"
    printf '$ %s\n%s\n' "$command" "$result"
    messages=$(jq -c --argjson call "$call" --arg result "$result" '. + [{role: "tool", tool_call_id: $call.id, content: $result}]' <<< "$messages")
  done < <(jq -c '.tool_calls[]' <<< "$message")
done
