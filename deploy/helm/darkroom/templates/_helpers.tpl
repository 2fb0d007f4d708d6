{{- define "darkroom.name" -}}
{{ printf "%s-%s" .Release.Name .part | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "darkroom.selector" -}}
app.kubernetes.io/name: darkroom
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "darkroom.labels" -}}
{{ include "darkroom.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "darkroom.image" -}}
{{ .image.repository }}:{{ default .Chart.AppVersion .image.tag }}
{{- end }}

{{/* Of the pod: no account of the cluster, no root. */}}
{{- define "darkroom.pod" -}}
automountServiceAccountToken: {{ ne .Values.serviceAccountName "" }}
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "darkroom.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment of all programs; `settings` is a list of maps, the later ones win: `merge` would lose false and 0. Numbers
are floats here; as JSON they keep all their digits, where `quote` alone would write 4.194304e+06. */}}
{{- define "darkroom.env" -}}
- name: DARKROOM_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ .Values.redis.secret.name }}, key: {{ .Values.redis.secret.key }}}
{{- with .Values.signingKeys.secret }}
{{- if .name }}
- name: DARKROOM_SIGNING_KEYS
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- end }}
- name: DARKROOM_STORE_URL
  value: {{ .Values.store.url | quote }}
- name: AWS_REGION
  value: {{ .Values.store.region | quote }}
{{- with .Values.store.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.store.publicEndpoint }}
- name: DARKROOM_STORE_PUBLIC_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- $settings := dict }}
{{- range .settings }}
{{- range $name, $value := . }}
{{- $_ := set $settings $name (kindIs "string" $value | ternary $value (toJson $value)) }}
{{- end }}
{{- end }}
{{- range $name, $value := $settings }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "darkroom.envFrom" -}}
{{- with .Values.store.secret.name }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}
