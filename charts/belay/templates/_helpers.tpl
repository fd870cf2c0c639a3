{{- define "belay.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* The selector labels. They must never change, because agents' NetworkPolicies refer to the gateway's. Takes the component's name. */}}
{{- define "belay.selector" -}}
app.kubernetes.io/name: belay-{{ . }}
{{- end }}

{{/* Takes a list of the root context and the component's name. */}}
{{- define "belay.labels" -}}
{{ include "belay.selector" (index . 1) }}
app.kubernetes.io/part-of: belay
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end }}

{{/* The operator's identity, as the API server sees it. */}}
{{- define "belay.operator" -}}
system:serviceaccount:{{ .Release.Namespace }}:belay-operator
{{- end }}

{{- define "belay.gateway" -}}
system:serviceaccount:{{ .Release.Namespace }}:belay-gateway
{{- end }}

{{/* The fields that both pods share. Takes a list of the root context and the component's name. */}}
{{- define "belay.podSpec" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := index $root.Values $component -}}
serviceAccountName: belay-{{ $component }}
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "belay.selector" $component | nindent 14 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "belay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Takes a list of the root context and the component's name. */}}
{{- define "belay.env" -}}
{{- $root := index . 0 -}}
- name: RUST_LOG
  value: {{ (index $root.Values (index . 1)).logLevel }}
{{- with $root.Values.telemetry.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . }}
{{- end }}
{{- end }}

{{- define "belay.probes" -}}
livenessProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 2
  failureThreshold: 2
{{- end }}

{{/* The strings of a list, quoted and separated by commas, for a list in CEL. */}}
{{- define "belay.celStrings" -}}
{{- range $i, $s := . }}{{ if $i }}, {{ end }}{{ $s | squote }}{{ end }}
{{- end }}

{{/* The NetworkPolicy peers that may read metrics: by default every pod that is not an agent's pod. */}}
{{- define "belay.metricsFrom" -}}
{{- if .Values.networkPolicy.metricsFrom -}}
{{ toYaml .Values.networkPolicy.metricsFrom }}
{{- else -}}
- namespaceSelector: {}
  podSelector:
    matchExpressions:
      - {key: belay.dev/task-uid, operator: DoesNotExist}
{{- end }}
{{- end }}
