{{/* Labels of everything that is installed. Takes the component's name. */}}
{{- define "pillion.labels" -}}
app.kubernetes.io/part-of: pillion
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end -}}

{{- define "pillion.selector" -}}
app.kubernetes.io/part-of: pillion
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* A pod of the control plane, as the Pod Security level "restricted" wants it. */}}
{{- define "pillion.podSecurity" -}}
runAsNonRoot: true
runAsUser: 2103
runAsGroup: 2103
fsGroup: 2103
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "pillion.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where pods of the control plane run. */}}
{{- define "pillion.placement" -}}
nodeSelector: {{ .root.Values.nodeSelector | toJson }}
{{- /* an empty list would differ from what is stored, for ever */}}
{{- if .root.Values.tolerations }}
tolerations: {{ .root.Values.tolerations | toJson }}
{{- end }}
{{- if .root.Values.priorityClassName }}
priorityClassName: {{ .root.Values.priorityClassName | quote }}
{{- end }}
{{- if .root.Values.imagePullSecrets }}
imagePullSecrets: {{ .root.Values.imagePullSecrets | toJson }}
{{- end }}
{{- if .root.Values.highAvailability }}
affinity:
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "pillion.selector" . | nindent 12 }}
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: topology.kubernetes.io/zone
          labelSelector:
            matchLabels:
              {{- include "pillion.selector" . | nindent 14 }}
{{- end }}
{{- end -}}

{{/* Probes of every component of the control plane: core/runtime/admin.py. */}}
{{- define "pillion.probes" -}}
startupProbe: {httpGet: {path: /live, port: admin}, periodSeconds: 1, failureThreshold: 60}
livenessProbe: {httpGet: {path: /live, port: admin}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}
readinessProbe: {httpGet: {path: /ready, port: admin}, periodSeconds: 2, timeoutSeconds: 2, failureThreshold: 7}
{{- end -}}

{{- define "pillion.strategy" -}}
{{- if .Values.highAvailability -}}
{type: RollingUpdate, rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
{{- else -}}
{type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
{{- end -}}
{{- end -}}

{{/* Variables that every component of the control plane reads. */}}
{{- define "pillion.env" -}}
- {name: PILLION_TRUST_DOMAIN, value: {{ .Values.trustDomain | quote }}}
- {name: PILLION_CONTROL_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: PILLION_POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: PILLION_POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
- {name: PILLION_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
{{- end -}}

{{/* A token that only the identity service takes. */}}
{{- define "pillion.token" -}}
- name: token
  projected:
    sources:
      - serviceAccountToken: {path: token, audience: identity.pillion.dev, expirationSeconds: 86400}
{{- end -}}
