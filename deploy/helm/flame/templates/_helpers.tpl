{{- define "flame.name" -}}
{{- if contains "flame" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-flame" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "flame.selector" -}}
app.kubernetes.io/name: flame
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "flame.labels" -}}
{{ include "flame.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "flame.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "flame.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "flame.name" .) }}
{{- end }}

{{- define "flame.scheme" -}}
{{ if .Values.tls.existingSecret }}https{{ else }}http{{ end }}
{{- end }}

{{- define "flame.url" -}}
{{ .Values.advertise | default (printf "%s://%s.%s.svc:%v" (include "flame.scheme" .) (include "flame.name" .) .Release.Namespace .Values.service.port) }}
{{- end }}

{{/* The computes file: the cluster itself, and what else there is. */}}
{{- define "flame.computes" -}}
{{- $own := dict "image" (.Values.workers.image | default (include "flame.image" .)) "imagePullPolicy" .Values.image.pullPolicy "namespace" .Release.Namespace -}}
{{- if .Values.imagePullSecrets }}{{ $names := list }}{{ range .Values.imagePullSecrets }}{{ $names = append $names .name }}{{ end }}{{ $_ := set $own "imagePullSecrets" $names }}{{ end -}}
{{- $contained := dict "spec" (dict "securityContext" (dict "runAsNonRoot" true "runAsUser" 1000 "runAsGroup" 1000)) -}}
{{- $_ := set $own "podTemplate" $contained -}}
{{- $compute := dict "name" "cluster" "kind" "kubernetes" "region" .Values.workers.region "config" (mergeOverwrite $own .Values.workers.config) -}}
{{- range $key := list "slots" "cpu" "memory" "gpu" }}{{ with index $.Values.workers $key }}{{ $_ := set $compute $key . }}{{ end }}{{ end -}}
{{ concat (list $compute) .Values.computes | toPrettyJson }}
{{- end }}
