//! A valid task with its contracts and its pack. Each test breaks one part.

use crate::api::{AgentTask, PolicyPack, ToolContract};

use super::validated::Installation;

pub(crate) fn task() -> AgentTask {
    read(
        r#"
        apiVersion: belay.dev/v1alpha1
        kind: AgentTask
        metadata: { name: triage, namespace: team-a, uid: 5d0e9c1a-0000-4000-8000-000000000001, generation: 1, resourceVersion: "7" }
        spec:
          objective: Find out why checkout is slow; costs $(HOME) nothing.
          workflowClass: incident
          principal: alice@example.test
          agent:
            image: registry.example.test/agent@sha256:aa
            args: [--verbose]
            env: [{ name: MODE, value: "fast $(PATH)" }]
            resources: { memory: 256Mi }
          tools: [tickets, read-log]
          workspace:
            mounts: [{ path: /workspace/input, configMap: incident }, { path: /workspace/keys, secret: keys }]
            writeScopes: [{ path: /tmp, size: 16Mi }]
          limits: { wallTimeSeconds: 600, toolCalls: 20, tokens: 10000 }
        "#,
    )
}

pub(crate) fn contracts() -> Vec<ToolContract> {
    vec![
        read(
            r#"
            apiVersion: belay.dev/v1alpha1
            kind: ToolContract
            metadata: { name: tickets, namespace: team-a }
            spec:
              tool: open_ticket
              description: Opens a ticket.
              upstream: { mcp: { url: "https://tickets.world.test/mcp", tool: create } }
              input: { type: object, required: [title], properties: { title: { type: string, maxLength: 80 } } }
              preconditions: [{ name: few, cel: "usage.toolCalls < 10", message: at most ten }]
              sideEffect: write
            "#,
        ),
        read(
            r#"
            apiVersion: belay.dev/v1alpha1
            kind: ToolContract
            metadata: { name: read-log, namespace: team-a }
            spec:
              tool: a_read_log
              description: Reads a log.
              upstream: { mcp: { url: "https://files.world.test:8443/mcp", tool: read } }
              input: { type: object, properties: { path: { type: string } } }
              sideEffect: read
            "#,
        ),
    ]
}

pub(crate) fn pack() -> PolicyPack {
    read(
        r#"
        apiVersion: belay.dev/v1alpha1
        kind: PolicyPack
        metadata: { name: dev, uid: 5d0e9c1a-0000-4000-8000-000000000002, generation: 3 }
        spec:
          environment: dev
          namespaceSelector: { matchLabels: { belay.dev/environment: dev } }
          workflowClasses:
          - name: incident
            runtimeClassName: gvisor
            allowedEffects: [write, read]
            limits: { wallTimeSeconds: 3600, toolCalls: 100, tokens: 100000 }
            resources: { cpu: 500m, memory: 512Mi, ephemeralStorage: 256Mi }
            egress:
            - { host: "*.world.test", uses: [Tools] }
            - { host: files.world.test, ports: [8443], uses: [Tools] }
            - { host: models.world.test, uses: [Models] }
          models: { openai: "https://models.world.test" }
          evidence: { bucket: belay-evidence, prefix: dev, mode: Compliance, retentionDays: 30 }
        "#,
    )
}

pub(crate) fn surroundings() -> Installation {
    Installation {
        system_namespace: "belay-system".into(),
        image: "localhost/belay:dev".into(),
        gateway: "10.96.7.7".into(),
        gateway_ca: "-----BEGIN CERTIFICATE-----\n…".into(),
        api_servers: vec!["10.96.0.1:443".into(), "10.200.0.10:6443".into()],
        harness_cpu: "10m".into(),
        harness_memory: "128Mi".into(),
    }
}

pub(crate) fn read<T: serde::de::DeserializeOwned>(yaml: &str) -> T {
    serde_saphyr::from_str(yaml).unwrap()
}
